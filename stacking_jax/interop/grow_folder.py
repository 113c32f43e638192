"""Growing a checkpoint that is larger than memory, a piece of a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, as_depth_map
from stacking_jax.growth.moments import POLICIES
from stacking_jax.interop import hugging_face, runs
from stacking_jax.interop.folders import refuse_existing
from stacking_jax.interop.grow_hugging_face import grow_hugging_face
from stacking_jax.interop.grow_run import grow_run
from stacking_jax.interop.tensor_files import MAX_SHARD_SIZE, parse_size

INITS = ("copy", "identity")
"""Starts of copies that need no more than the copy itself; see `growth.starts`."""

Map = DepthMap | Sequence[int] | Callable[[int], DepthMap]


def stored_depth(source: str | Path, step: int | None = None) -> int:
    """The layers of a Hugging Face folder, a run or a checkpoint.

    Raises:
      UserError: if it is none of them.
    """
    if runs.is_run(source):
        return runs.find(source, step).depth
    return hugging_face.read(source).depth


def grow_folder(
    source: str | Path,
    target: str | Path,
    depth_map: Map,
    *,
    init: str = "copy",
    moments: str | None = None,
    step: int | None = None,
    total_steps: int | None = None,
    operator: str | None = None,
    options: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Materialises a depth map on a checkpoint on disk.

    Whatever the size of the model, what is in memory are a few pieces of
    `checkpoints.CHUNK_BYTES` or less. (Only a run saved by a version that did not
    store a layer per chunk needs its largest array in memory.)

    Args:
      source: a Hugging Face folder of the Llama family (config.json and
        safetensors), a run directory, or one checkpoint in it.
      target: the new folder of the same kind; it appears whole or not at all. Of a
        run: a run of the grown depth, in the middle of its training: `train` goes
        on at the same step and grows no further.
      depth_map: a map, the stored layer of each new one, or a function from the
        stored depth to a map.
      init: how copies begin: 'copy', or 'identity' with zeros in their output
        projections, so that the grown model computes what the small one does.
      moments: what the optimiser knows of copies, see `growth.grow_opt_state`; None
        is 'copy'. A Hugging Face folder has no optimiser state: None there.
      step: of the checkpoint of a run; None for the newest.
      total_steps: of the grown run; None keeps the number that the run had.
      operator, options: the name of the operator that gives the map, and its
        arguments, for the plan and the history of the grown run.
      max_shard_size: of Hugging Face folders: more goes into several files.

    Raises:
      UserError: if the source is damaged or of an unknown kind, the map does not
        fit its depth, or something is at `target`.
    """
    if init not in INITS:
        raise UserError(
            f"on disk, copies begin as {' or '.join(INITS)}; got {init!r} (in memory, "
            "growth.start_copies has more)"
        )
    if moments not in (None, *POLICIES):
        raise UserError(f"moments of copies are one of {', '.join(POLICIES)}; got {moments!r}")
    refuse_existing(target)
    if runs.is_run(source):
        found = runs.find(source, step)
        grow_run(
            found, target, _resolve(depth_map, found.depth), init=init,
            moments=moments or "copy", total_steps=total_steps, operator=operator, options=options,
        )
        return
    for name, given in (("moments", moments), ("step", step), ("total_steps", total_steps)):
        if given is not None:
            raise UserError(f"{source} is no run of ours: it has no {name} to choose")
    folder = hugging_face.read(source)
    grow_hugging_face(
        folder, target, _resolve(depth_map, folder.depth), init=init,
        max_shard_size=parse_size(max_shard_size),
    )


def _resolve(depth_map: Map, depth: int) -> DepthMap:
    if callable(depth_map):
        depth_map = depth_map(depth)
    depth_map = as_depth_map(depth_map, stored=depth)
    if any(source not in range(depth) for source in depth_map.sources):
        raise UserError(
            f"the map {depth_map} makes layers without a source; on disk there are copies only"
        )
    if not depth:
        raise UserError("the checkpoint stores no layers, so there are none to copy")
    return depth_map
