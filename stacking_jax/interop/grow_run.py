"""Growing a checkpoint of ours: parameters and optimiser state, region by region."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap
from stacking_jax.growth.layouts import path_keys
from stacking_jax.growth.outputs import PRESETS, output_names
from stacking_jax.growth.restart import FIRST_MOMENTS, SECOND_MOMENTS
from stacking_jax.growth.stacks import positions_of
from stacking_jax.interop import runs, stored_state
from stacking_jax.interop.folders import byte_progress, new_folder
from stacking_jax.interop.run_files import copy_foreign, grown_config, grown_meta, write_run_files
from stacking_jax.interop.stored_state import Keys, StoredState
from stacking_jax.models import LAYOUT
from stacking_jax.training import manifest
from stacking_jax.training.config import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Start:
    """What some layers of one array hold in place of a copy of their source.

    Attributes:
      positions: which layers of the grown stack; every array outside it counts as one.
      values: from the source's values (of the array at `read`) to theirs; None for zeros.
      read: another array of the same shape to read instead of this one.
    """

    positions: frozenset[int] = frozenset()
    values: Callable[[np.ndarray], np.ndarray] | None = None
    read: Keys | None = None


def grow_run(
    found: runs.RunCheckpoint,
    target: str | Path,
    depth_map: DepthMap,
    *,
    init: str,
    moments: str,
    total_steps: int | None = None,
    operator: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """See `grow_folder`."""
    if found.config.loops.loops is not None:
        raise UserError(
            f"{found.run_dir} trains with loops (LoopConfig.loops = {found.config.loops.loops}), "
            "whose plan a growth on disk cannot go on with: export the run, which writes its "
            "layers as often as they run, and grow that folder"
        )
    config = grown_config(
        found, depth_map, operator=operator, options=options, total_steps=total_steps
    )
    meta = grown_meta(found, config, depth_map, operator=operator, init=init, moments=moments)
    old = StoredState(found.folder)
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _grown_shape(path_keys(path), leaf, depth_map), old.tree
    )
    start_of = _starts(depth_map, init, moments, found.config.optimizer, old.shapes())
    recorded = runs.recorded(found.run_dir)
    with new_folder(target) as made:
        (made / "checkpoints").mkdir()
        step = made / "checkpoints" / str(found.step)
        new = stored_state.create(step, tree, meta, like=old)
        writer = stored_state.Writer()
        shapes = new.shapes()
        with byte_progress("growing", sum(map(stored_state.nbytes, shapes.values()))) as advance:
            for keys, leaf in shapes.items():
                if LAYOUT.matches(keys):
                    _copy_layers(old, new, keys, leaf, depth_map, start_of(keys), writer, advance)
                else:
                    _copy_whole(old, new, keys, leaf, start_of(keys), writer, advance)
                writer.finish()
        manifest.write(step, digests=config.checkpoint_digests)
        write_run_files(made, config, recorded.get("data_digest"))
        copy_foreign(found.run_dir, made)


def _copy_whole(old, new, keys, leaf, start: Start, writer, advance) -> None:
    source, target = old.open(keys), new.open(keys, write=True)
    if start.positions:
        writer.zeros(target)
    else:
        for region in stored_state.regions(leaf.shape, stored_state.chunk_shape(target)):
            writer.write(target[region], old.values(source[region]))
    advance(stored_state.nbytes(leaf))


def _copy_layers(old, new, keys, leaf, depth_map, start: Start, writer, advance) -> None:
    source, target = old.open(keys), new.open(keys, write=True)
    other = old.open(start.read) if start.read else source
    layer_bytes = stored_state.nbytes(leaf) // len(depth_map)
    chunk = stored_state.chunk_shape(target)[1:]
    for layer in sorted(set(depth_map.sources)):
        wanted = [at for at, it in enumerate(depth_map.sources) if it == layer]
        plain = [at for at in wanted if at not in start.positions]
        changed = [at for at in wanted if at in start.positions and start.values is not None]
        for region in stored_state.regions(leaf.shape[1:], chunk):
            if plain:
                values = old.values(source[(layer, *region)])
                for at in plain:
                    writer.write(target[(at, *region)], values)
            if changed:
                values = start.values(old.values(other[(layer, *region)]))
                for at in changed:
                    writer.write(target[(at, *region)], values)
        for at in wanted:
            if at in start.positions and start.values is None:
                writer.zeros(target, at)
        advance(layer_bytes * len(wanted))


_CONSTANTS = {"ns_coeffs"}
"""What Muon's state holds beside its momentum: the coefficients of its iteration."""


def _starts(
    depth_map: DepthMap, init: str, moments: str, optimizer: OptimizerConfig,
    state: Collection[Keys],
) -> Callable[[Keys], Start]:
    """From the path of an array to how its copies start.

    Equal to `growth.start_copies` and `growth.grow_opt_state`, which need whole
    arrays in memory. All optimisers of ours are per layer and begin with zeros, so
    a moment that starts afresh is zero and takes its count along; constants stay.
    """
    copies = frozenset(np.flatnonzero(positions_of(depth_map).started).tolist())
    everything = frozenset(range(len(depth_map)))
    owners = {
        keys[:at] for keys in state for at, name in enumerate(keys)
        if name in FIRST_MOMENTS | SECOND_MOMENTS
    }
    if moments == "copy_first":
        if optimizer.name != "adamw":
            raise UserError(
                f"copy_first knows Adam's moments, but the run trains with {optimizer.name}; use "
                "'copy' or 'reset_copies'"
            )
        warn(
            "copy_first: the copies keep their source's first moment and forget the second; 'copy' "
            "or 'reset_copies' is the safer choice"
        )

    def start_of(keys: Keys) -> Start:
        if keys[0] == "params":
            silent = init == "identity" and output_names(PRESETS["decoder"], [keys])
            return Start(copies) if silent else Start()
        if keys[0] != "opt_state" or moments == "copy" or _CONSTANTS & set(keys):
            return Start()
        if moments == "reset_all":
            # A count without moments (Muon's, of the tensors that it leaves to Adam) is no one's.
            counted = any(keys[:at] in owners for at in range(len(keys)))
            return Start(everything) if counted else Start()
        if not LAYOUT.matches(keys):
            return Start()
        return _first_step(keys, copies, optimizer) if moments == "copy_first" else Start(copies)

    return start_of


def _first_step(keys: Keys, copies: frozenset[int], optimizer: OptimizerConfig) -> Start:
    """Adam's state after one step of a fresh optimiser along the source's first moment."""
    if "mu" in keys:
        return Start(copies, lambda mu: np.float32(1 - optimizer.beta1) * mu)
    if "nu" in keys:
        # Twice the square, as `grow_opt_state`: no first update is longer than a fresh Adam's.
        return Start(
            copies, lambda mu: np.float32(2 * (1 - optimizer.beta2)) * np.square(mu),
            read=tuple("mu" if key == "nu" else key for key in keys),
        )
    return Start(copies, np.ones_like)


def _grown_shape(
    keys: Keys, leaf: jax.ShapeDtypeStruct, depth_map: DepthMap
) -> jax.ShapeDtypeStruct:
    if not LAYOUT.matches(keys):
        return leaf
    if not leaf.shape or leaf.shape[0] != depth_map.stored:
        raise UserError(
            f"{'/'.join(keys)} has shape {leaf.shape}; expected {depth_map.stored} layers on "
            "axis 0"
        )
    return jax.ShapeDtypeStruct((len(depth_map), *leaf.shape[1:]), leaf.dtype)
