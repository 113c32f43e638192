"""The training state: made from shapes first, sharded from its birth."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stacking_jax.growth.layouts import path_keys
from stacking_jax.models import LAYOUT, Decoder, DecoderConfig
from stacking_jax.training import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: int32 scalar, updates done over all stages.
      params: nested dicts of float32 arrays.
      opt_state: the optimiser's state.
      spikes: the window of gradient norms, see `spikes.judge`; None without a policy.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    spikes: Any = None


def model_graph(config: DecoderConfig) -> Any:
    """The decoder without its parameters; the same for every depth."""
    return nnx.graphdef(_traced(config, 1))


def initial_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, depth: int,
    seed: int | jax.Array,
) -> TrainState:
    """A fresh state that stores `depth` layers. Pure: trace it, or run it under jit.

    `seed` is a whole number or a random key.
    """
    key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    return _fresh(optimizer, _parameters(Decoder(config, depth=depth, key=key)))


def _fresh(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _parameters(model: Decoder) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=64)
def _traced(config: DecoderConfig, depth: int) -> Decoder:
    """The decoder with shapes for parameters; nobody changes it.

    Kept, as tracing one takes a twentieth of a second and a run asks for dozens: for each of its
    stages, growths, checkpoints and programs.
    """
    return nnx.eval_shape(lambda: Decoder(config, depth=depth, key=jax.random.key(0)))


def abstract_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, depth: int,
    mesh: sharding.LogicalMesh,
) -> TrainState:
    """Shapes, dtypes and shardings of a state, with no memory behind them.

    A leaf of the optimiser is sharded like the parameter that it belongs to, if
    it has that parameter's shape. Others (factored moments, counts) are small
    and whole on every device.

    Raises:
      UserError: if the mesh cannot divide a parameter.
    """
    params = abstract_params(config, depth, mesh)
    shapes = jax.eval_shape(
        lambda params: _fresh(optimizer, params), _parameters(_traced(config, depth))
    )
    by_path = {
        path_keys(path): (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    whole = mesh.sharding(())

    def place(path, leaf):
        keys = path_keys(path)
        for start in range(len(keys)):
            shape, wanted = by_path.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return leaf.update(sharding=wanted)
        return leaf.update(sharding=whole)

    return jax.tree_util.tree_map_with_path(place, shapes)


def abstract_params(config: DecoderConfig, depth: int, mesh: sharding.LogicalMesh) -> Any:
    """Shapes, dtypes and shardings of the parameters, as nested dicts.

    Raises:
      UserError: if the mesh cannot divide a parameter.
    """
    axes = _parameter_axes(config)

    def place(path, leaf):
        keys = path_keys(path)
        where = sharding.named_sharding(mesh, axes[keys], leaf.shape, "/".join(keys))
        return leaf.update(sharding=where)

    return jax.tree_util.tree_map_with_path(place, _parameters(_traced(config, depth)))


def shardings_of(tree: Any) -> Any:
    """The shardings of an abstract or concrete tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def initial_program(
    config: DecoderConfig, optimizer: optax.GradientTransformation, abstract: TrainState
) -> Any:
    """The jitted `key -> TrainState`, whose every value is drawn where it is to lie.

    The key is an argument, so that all seeds share one compiled program.
    """
    depth = jax.tree.leaves(abstract.params["stack"])[0].shape[0]
    return jax.jit(
        lambda key: initial_state(config, optimizer, depth, key),
        out_shardings=shardings_of(abstract),
    )


def sharded_initial_state(
    config: DecoderConfig, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState
) -> TrainState:
    """Initialises straight into shards: the full parameters never lie on one device."""
    return initial_program(config, optimizer, abstract)(jax.random.key(seed))


def params_digest(params: Any) -> str:
    """SHA-256 over all parameters: path, dtype, shape and bytes, sorted by path."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in sorted(leaves, key=lambda item: path_keys(item[0])):
        values = np.asarray(_whole_on_host(leaf))
        digest.update(f"{'/'.join(path_keys(path))}:{values.dtype}:{values.shape};".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _whole_on_host(leaf: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return jax.device_get(leaf)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)


def _parameter_axes(config: DecoderConfig) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Path of a parameter -> the names of its axes, the layer axis included."""
    model = _traced(config, 1)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    axes = {}
    for path, param in jax.tree_util.tree_flatten_with_path(
        nnx.state(model, nnx.Param), is_leaf=is_param
    )[0]:
        keys = path_keys(path)
        axes[keys] = (("layers",) if LAYOUT.matches(keys) else ()) + param.axes
    return axes
