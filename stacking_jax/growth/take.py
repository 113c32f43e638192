"""What growth does to one array: take layers, or mix them, wherever the array lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import NEW, DepthMap, contiguous_runs
from stacking_jax.growth.later import Later, check_divisible


@dataclasses.dataclass(frozen=True)
class Mix:
    """New layers as weighted sums of stored ones.

    Attributes:
      matrix: `[new, old]`, in units of layers; NumPy, JAX or traced.
    """

    matrix: Any

    @property
    def stored(self) -> int:
        return self.matrix.shape[1]

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def as_map(self) -> DepthMap | None:
        """The depth map that this matrix is, if every row takes one layer whole.

        None for a traced matrix, whose entries are not known.
        """
        if isinstance(self.matrix, jax.core.Tracer):
            return None
        values = np.asarray(self.matrix)
        if not ((values == 0) | (values == 1)).all() or not (values.sum(axis=1) == 1).all():
            return None
        return DepthMap(values.argmax(axis=1).tolist(), stored=self.stored)


def as_rule(depth_map: Any) -> DepthMap | Mix | Sequence[int]:
    """A map as it is, a `[new, old]` matrix as `Mix` (or as the map that it is).

    Raises:
      UserError: if a matrix is empty or holds no numbers.
    """
    if isinstance(depth_map, DepthMap):
        return depth_map
    if isinstance(depth_map, list | tuple) and any(np.ndim(row) == 1 for row in depth_map):
        depth_map = _as_numpy_matrix(depth_map)
    if getattr(depth_map, "ndim", 1) == 1:
        return depth_map
    if depth_map.ndim != 2 or 0 in depth_map.shape:
        raise UserError(
            f"a growth is a list of layers or a matrix [new, old]; got shape {depth_map.shape}"
        )
    if not (jnp.issubdtype(depth_map.dtype, np.number) or depth_map.dtype == bool):
        raise UserError(f"a matrix of layers holds numbers; got {depth_map.dtype}")
    mix = Mix(depth_map)
    # The values of a JAX array are left on the device; see `take_or_mix`.
    whole = mix.as_map() if isinstance(depth_map, np.ndarray) else None
    return mix if whole is None else whole


def _as_numpy_matrix(rows: Sequence) -> np.ndarray:
    try:
        return np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise UserError("the rows of a matrix [new, old] must be equally long numbers") from None


def per_layer(depth_map: DepthMap, period: int) -> tuple[int, ...]:
    """The stored layer (or `NEW`) of each layer, where the map counts units of `period`."""
    return tuple(
        NEW if unit == NEW else unit * period + i
        for unit in depth_map.sources
        for i in range(period)
    )


def is_copy(sources: Sequence[int]) -> tuple[bool, ...]:
    """For each layer, whether an earlier one has the same source."""
    return tuple(
        source != NEW and source in sources[:i] for i, source in enumerate(sources)
    )


def take_scanned(
    leaf: Any, sources: Sequence[int], axis: int, fresh: Any, later: Later, name: str
) -> Any:
    """The layers `sources` of a stacked array; `NEW` ones from the same place of `fresh`."""
    shape = (*leaf.shape[:axis], len(sources), *leaf.shape[axis + 1 :])
    if isinstance(leaf, jax.ShapeDtypeStruct):
        check_divisible(leaf.sharding, shape, name)
        return leaf.update(shape=shape)
    if isinstance(leaf, np.ndarray) and isinstance(fresh, np.ndarray | None):
        return _take_numpy(leaf, sources, axis, fresh)
    arrays = [leaf] if fresh is None else [leaf, fresh]
    return later.do(lambda *given: _take(*given, sources=sources, axis=axis), arrays, leaf, name)


def _take_numpy(leaf: np.ndarray, sources: Sequence[int], axis: int, fresh) -> np.ndarray:
    new = [i for i, source in enumerate(sources) if source == NEW]
    if not new:
        return np.take(leaf, sources, axis=axis)
    both = np.concatenate([leaf, np.take(fresh, new, axis=axis)], axis=axis)
    places = iter(range(leaf.shape[axis], both.shape[axis]))
    return np.take(both, [next(places) if s == NEW else s for s in sources], axis=axis)


def _take(leaf, fresh=None, *, sources: Sequence[int], axis: int):
    # Slices put end to end rather than a gather: they are plain copies on every
    # backend, and a map has few contiguous runs.
    pieces, at = [], 0
    for first, last in contiguous_runs(sources):
        found, start = (fresh, at) if first == NEW else (leaf, first)
        length = last - first + 1
        pieces.append(jax.lax.slice_in_dim(jnp.asarray(found), start, start + length, axis=axis))
        at += length
    taken = jnp.concatenate(pieces, axis=axis) if len(pieces) > 1 else pieces[0]
    copies = is_copy(sources)
    if not _is_key(taken) or not any(copies):
        return taken
    moved = jnp.moveaxis(taken, axis, 0)
    layers = [_new_key(moved[i], i, len(sources)) if copies[i] else moved[i] for i in range(at)]
    return jnp.stack(layers, axis=axis)


def copy_layer(leaf: Any, position: int, depth: int, later: Later, name: str) -> Any:
    """A copy of one unrolled layer's leaf, with a buffer of its own."""
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if not isinstance(leaf, jax.Array):
        return leaf
    if _is_key(leaf):
        return later.do(lambda key: _new_key(key, position, depth), [leaf], leaf, name)
    return later.do(jnp.copy, [leaf], leaf, name)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _new_key(key: jax.Array, position: int, depth: int) -> jax.Array:
    """A random key for a copy: with its source's, both would drop the same units.

    `depth` keeps the keys of one growth apart from those of the next.
    """
    fold = lambda one: jax.random.fold_in(one, depth * depth + position)  # noqa: E731
    return jax.vmap(fold)(key.reshape(-1)).reshape(key.shape)


def mix_scanned(
    leaf: Any, mix: Mix, axis: int, period: int, later: Later, name: str
) -> Any:
    """Every new unit of a stacked array as a weighted sum of stored units."""
    shape = (*leaf.shape[:axis], len(mix) * period, *leaf.shape[axis + 1 :])
    if isinstance(leaf, jax.ShapeDtypeStruct):
        check_divisible(leaf.sharding, shape, name)
        return leaf.update(shape=shape)

    def run(leaf, matrix):
        math = np if isinstance(leaf, np.ndarray) and isinstance(matrix, np.ndarray) else jnp
        wide = _wide(leaf.dtype)
        moved = math.moveaxis(leaf, axis, 0)
        units = moved.reshape(mix.stored, period, *moved.shape[1:]).astype(wide)
        precision = {} if math is np else {"precision": jax.lax.Precision.HIGHEST}
        mixed = math.tensordot(matrix.astype(wide), units, axes=1, **precision)
        mixed = mixed.reshape(-1, *moved.shape[1:])
        return math.moveaxis(mixed, 0, axis).astype(leaf.dtype)

    return later.do(run, [leaf, mix.matrix], leaf, name)


def mix_unrolled(leaves: Sequence[Any], mix: Mix, row: int, later: Later, name: str) -> Any:
    """One new layer's leaf as the weighted sum of the stored units' leaves."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return leaves[0]

    def run(*arrays):
        *arrays, matrix = arrays
        wide = _wide(arrays[0].dtype)
        weights = matrix[row].astype(wide)
        total = sum(weights[i] * array.astype(wide) for i, array in enumerate(arrays))
        return total.astype(arrays[0].dtype)

    return later.do(run, [*leaves, mix.matrix], leaves[0], name)


def _wide(dtype: Any) -> Any:
    """float32 at least, so that low precision rounds once."""
    return dtype if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)


def check_mixable(leaf: Any, name: str) -> None:
    """Refuses to average what is no number.

    Raises:
      UserError: naming the leaf.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise UserError(
            f"{name} is {dtype or type(leaf).__name__}: a matrix can mix floating-point layers "
            "only; of others every row must take one layer whole"
        )
