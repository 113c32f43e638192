"""Growing a Hugging Face folder: tensors are copied from file to file under new names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stacking_jax.growth import DepthMap
from stacking_jax.growth.outputs import PRESETS, check_outputs, output_names
from stacking_jax.growth.stacks import positions_of
from stacking_jax.interop import hugging_face
from stacking_jax.interop.folders import byte_progress, new_folder
from stacking_jax.interop.tensor_files import Tensor, write_folder, write_json


def grow_hugging_face(
    folder: hugging_face.Folder,
    target: str | Path,
    depth_map: DepthMap,
    *,
    init: str,
    max_shard_size: int,
) -> None:
    """See `grow_folder`. Works by name, so that any model of the family can be grown.

    No value is looked at, so a copy has the bits of its source in any dtype.
    """
    silent: set[str] = set()
    if init == "identity":
        names = [(rest,) for rest in folder.layers[0]]
        check_outputs(PRESETS["llama"], names)
        silent = {name[0] for name in output_names(PRESETS["llama"], names)}
    started = positions_of(depth_map).started

    def layer(number: int) -> list[Tensor]:
        return [
            dataclasses.replace(
                tensor.zeros() if rest in silent and started[number] else tensor,
                name=f"model.layers.{number}.{rest}",
            )
            for rest, tensor in folder.layers[depth_map.sources[number]].items()
        ]

    layers = [tensor for number in range(len(depth_map)) for tensor in layer(number)]
    # The embedding first and the head last, as Hugging Face writes them.
    first = [tensor for name, tensor in folder.others.items() if "embed" in name]
    last = [tensor for name, tensor in folder.others.items() if "embed" not in name]
    tensors = [*first, *layers, *last]
    values = hugging_face.grown_config(folder, depth_map)
    with new_folder(target) as made:
        with byte_progress("growing", sum(tensor.nbytes for tensor in tensors)) as advance:
            write_folder(made, tensors, max_shard_size, advance)
        write_json(made / "config.json", values)
        hugging_face.copy_other_files(folder.path, made)
