"""Our decoder as a Hugging Face folder that `LlamaForCausalLM` loads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from stacking_jax.console import say, warn
from stacking_jax.data import DataConfig, tokenizer
from stacking_jax.data.vocabularies import Bytes, SentencePiece
from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import path_keys
from stacking_jax.interop import hugging_face, llama_names, runs
from stacking_jax.interop.folders import byte_progress, new_folder
from stacking_jax.interop.stored_state import StoredState
from stacking_jax.interop.tensor_files import (
    MAX_SHARD_SIZE,
    Tensor,
    parse_size,
    read_json,
    write_folder,
    write_json,
)
from stacking_jax.models import DecoderConfig
from stacking_jax.training.stack_runs import stored_runs

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Read = Callable[[llama_names.Path, int | None], np.ndarray]


def export_run(
    source: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a checkpoint of a run as a Hugging Face folder, a layer at a time.

    The model has the depth of the checkpoint, which may be that of an early stage. Layers that
    are tied, of a looped model, are written once for every time that they run.

    Args:
      source: a run directory, or one checkpoint in it.
      out: the new folder; it appears whole or not at all.
      step: of the checkpoint; None for the newest.
      dtype: of the weights, 'float32' (exact) or 'bfloat16'.
      max_shard_size: more than this goes into several files, such as '5GB'.

    Raises:
      UserError: if the checkpoint cannot be read, something is at `out`, or the model injects
        its input into its loops.
    """
    found = runs.find(source, step)
    if found.config.model.bidirectional_prompts:
        warn(
            "the model was trained with prompts whose tokens see one another; in a Llama class "
            "every token sees only those before it (DecoderConfig.bidirectional_prompts)"
        )
    sources = _sources(found)
    stored = StoredState(found.folder)
    shapes = {
        keys[1:]: leaf.shape for keys, leaf in stored.shapes().items() if keys[0] == "params"
    }
    config = found.config
    vocabulary = _tokenizer(config.data, found.run_dir)
    foreign = found.run_dir / runs.FOREIGN

    def read(path: llama_names.Path, layer: int | None) -> np.ndarray:
        return stored.read(("params", *path), layer)

    values = hugging_face.config_values(
        config.model, len(sources), dtype=dtype, max_positions=config.data.sequence_length,
        eos_id=vocabulary.eos_id if vocabulary else None,
    )
    if foreign.is_dir():
        before = read_json(foreign / "config.json")
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        values |= {name: before[name] for name in kept if name in before}
    with _new_model(
        out, _tensors(config.model, sources, shapes, read, dtype), values, max_shard_size
    ) as folder:
        if foreign.is_dir():
            hugging_face.copy_other_files(foreign, folder)
        elif vocabulary:
            _write_tokenizer(vocabulary, folder)


def _sources(found: runs.RunCheckpoint) -> Sequence[int]:
    """The stored layer of every layer that is written."""
    if not found.depth:
        raise UserError(
            f"checkpoint {found.step} of {found.run_dir} is of a stage without layers, and a Llama "
            "class has at least one: export a checkpoint from after the growth"
        )
    how = stored_runs(found.meta)
    loop, depth_map = how.get("loop"), how.get("depth_map")
    if loop is not None and loop.inject is not None and loop.turns > 1:
        raise UserError(
            f"a Llama class cannot do what this model does: LoopConfig.inject = {loop.inject!r} "
            f"adds to the stream before every loop; it is not exported"
        )
    if depth_map is None:
        return range(found.depth)
    say(
        f"the model runs {found.depth} layers as {depth_map}: they are written as "
        f"{len(depth_map)} layers of their own, equal where they were tied"
    )
    return depth_map.sources


def export_params(
    params: Mapping[str, Any],
    config: DecoderConfig,
    out: str | Path,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    max_positions: int = 2048,
    eos_id: int | None = None,
) -> None:
    """Writes parameters in memory as a Hugging Face folder.

    Args:
      params: nested dicts of our decoder, of any depth.
      config: the decoder's shape; its `num_layers` is not read.
      out, dtype, max_shard_size: see `export_run`.
      max_positions: the sequence length that the model was trained for.
      eos_id: the token that ends a document.
    """
    leaves = {
        path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    depth = next(shape[0] for path, shape in shapes.items() if path[:2] == llama_names.STACK)

    def read(path: llama_names.Path, layer: int | None) -> np.ndarray:
        leaf = leaves[path] if layer is None else leaves[path][layer]
        return np.asarray(jax.device_get(leaf))

    values = hugging_face.config_values(
        config, depth, dtype=dtype, max_positions=max_positions, eos_id=eos_id
    )
    tensors = _tensors(config, range(depth), shapes, read, dtype)
    with _new_model(out, tensors, values, max_shard_size):
        pass


def _tensors(
    config: DecoderConfig,
    sources: Sequence[int],
    shapes: Mapping[llama_names.Path, tuple[int, ...]],
    read: Read,
    dtype: str,
) -> list[Tensor]:
    """The tensors of `LlamaForCausalLM`, embedding first; layer i is stored layer sources[i]."""
    if dtype not in DTYPES:
        raise UserError(f"weights are written as {' or '.join(DTYPES)}; got {dtype!r}")

    def tensor(name: str, path: llama_names.Path, layer: int | None) -> Tensor:
        if path not in shapes:
            raise UserError(f"the checkpoint holds no parameter {'/'.join(path)}")
        shape = shapes[path] if layer is None else shapes[path][1:]
        transposed = llama_names.is_transposed(path)

        def values() -> np.ndarray:
            array = read(path, layer)
            return array.T if transposed else array

        return Tensor.lazy(name, DTYPES[dtype], shape[::-1] if transposed else shape, values)

    outside = [tensor(name, path, None) for path, name in llama_names.outside(config).items()]
    layers = [
        tensor(llama_names.layer_tensor(number, rest), (*llama_names.STACK, *path), source)
        for number, source in enumerate(sources)
        for path, rest in llama_names.LAYER.items()
    ]
    return [outside[0], *layers, *outside[1:]]


@contextlib.contextmanager
def _new_model(
    out: str | Path, tensors: list[Tensor], values: Mapping[str, Any], max_shard_size: int | str
) -> Iterator[Path]:
    """A new folder with weights and configuration, open for what goes beside them."""
    limit = parse_size(max_shard_size)
    total = sum(tensor.nbytes for tensor in tensors)
    with new_folder(out) as folder:
        with byte_progress("writing", total) as advance:
            write_folder(folder, tensors, limit, advance)
        write_json(folder / "config.json", values)
        yield folder


def _tokenizer(data: DataConfig, run_dir: Path) -> Bytes | SentencePiece | None:
    try:
        return tokenizer(data)
    except UserError as error:
        if not (run_dir / runs.FOREIGN).is_dir():
            warn(f"no tokenizer is written: {error}")
        return None


def _write_tokenizer(vocabulary: Bytes | SentencePiece, folder: Path) -> None:
    """Hugging Face's tokenizer of the same ids: seqio's are ByT5's and T5's."""
    common = {
        "extra_ids": vocabulary.info.extra_ids, "pad_token": "<pad>", "eos_token": "</s>",
        "unk_token": "<unk>", "additional_special_tokens": [
            f"<extra_id_{i}>" for i in range(vocabulary.info.extra_ids)
        ],
    }
    if isinstance(vocabulary, SentencePiece):
        (folder / "spiece.model").write_bytes(vocabulary.model)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", **common})
    else:
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", **common})
