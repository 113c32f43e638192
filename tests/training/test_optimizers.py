"""Optimisers see layers: a stacked leaf is updated as so many separate ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stacking_jax.growth import Scanned, grow, midas
from stacking_jax.training import OptimizerConfig
from stacking_jax.training.optimizers import layerwise, optimizer

LAYOUT = Scanned("stack/layers")
DEPTH = 4
CONFIGS = {
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1),
    "adafactor": OptimizerConfig(name="adafactor", weight_decay=0.01),
}


def tree(seed: int, depth: int = DEPTH) -> dict:
    """Parameters or gradients; the matrix is large enough for Adafactor to factor."""
    keys = jax.random.split(jax.random.key(seed), 4)
    # Layers of very different size, so that whatever mixes them shows.
    size = 10.0 ** jnp.arange(depth, dtype=jnp.float32)[:, None]
    return {
        "embedding": jax.random.normal(keys[0], (130, 128)),
        "norm": {"scale": jax.random.normal(keys[1], (128,))},
        "stack": {
            "layers": {
                "kernel": size[:, :, None] * jax.random.normal(keys[2], (depth, 128, 160)),
                "scale": size * jax.random.normal(keys[3], (depth, 128)),
            }
        },
    }


def direct(config: OptimizerConfig) -> optax.GradientTransformation:
    """The same directions, put together from optax without any stacking."""
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    )
    if config.name == "adamw":
        return optax.chain(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon), decay)
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=config.factored_decay),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        decay,
    )


def unstacked(params: dict) -> dict:
    layers = params["stack"]["layers"]
    depth = layers["kernel"].shape[0]
    listed = [jax.tree.map(lambda leaf: leaf[i], layers) for i in range(depth)]
    return {**params, "stack": {"layers": listed}}


def restacked(params: dict) -> dict:
    layers = params["stack"]["layers"]
    return {
        **params, "stack": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    }


def assert_close(got, want):
    """Equal up to 4e-7 of the largest number of each layer (of each row elsewhere)."""
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        largest = np.abs(other).max(axis=tuple(range(1, other.ndim)), keepdims=True, initial=1e-30)
        np.testing.assert_array_less(np.abs(one - other) / largest, 4e-7, err_msg=str(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_stacked_layers_are_updated_like_separate_ones(name):
    together, apart = optimizer(CONFIGS[name], LAYOUT), direct(CONFIGS[name])
    params = tree(0)
    state, apart_state = together.init(params), apart.init(unstacked(params))
    for seed in range(1, 4):
        gradients = tree(seed)
        got, state = together.update(gradients, state, params)
        want, apart_state = apart.update(unstacked(gradients), apart_state, unstacked(params))
        assert_close(got, restacked(want))
        params = jax.tree.map(lambda leaf, step: leaf - 0.01 * step, params, got)


def test_what_it_replaces_mixes_the_layers():
    """Without `layerwise`, Adafactor on the stacked leaf gives something else."""
    gradients, params = tree(1), tree(0)
    plain = direct(CONFIGS["adafactor"])
    mixed, _ = plain.update(gradients, plain.init(params), params)
    ours = optimizer(CONFIGS["adafactor"], LAYOUT)
    apart, _ = ours.update(gradients, ours.init(params), params)
    kernels = [step["stack"]["layers"]["kernel"][0] for step in (mixed, apart)]
    assert float(jnp.max(jnp.abs(kernels[0] / kernels[1] - 1))) > 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_growing_commutes_with_the_update(name):
    transform, growth = optimizer(CONFIGS[name], LAYOUT), midas(DEPTH, 2)
    params = tree(0)
    state = transform.init(params)
    for seed in (1, 2):
        _, state = transform.update(tree(seed), state, params)
    gradients = tree(3)

    step, after = transform.update(gradients, state, params)
    grown_step, grown_after = transform.update(
        grow(gradients, growth, LAYOUT), grow(state, growth, LAYOUT), grow(params, growth, LAYOUT)
    )
    assert_close(grown_step, grow(step, growth, LAYOUT))
    assert_close(grown_after, grow(after, growth, LAYOUT))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_grown_state_is_one_of_the_grown_parameters(name):
    """Every leaf of the layers grows, counts included, and nothing else does."""
    transform, growth = optimizer(CONFIGS[name], LAYOUT), midas(DEPTH, 2)
    params = tree(0)
    grown = grow(transform.init(params), growth, LAYOUT)
    fresh = transform.init(grow(params, growth, LAYOUT))
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    assert shapes(grown) == shapes(fresh)


def test_only_matrices_decay():
    """A stacked norm scale is [layers, D], and still a vector."""
    config = OptimizerConfig(weight_decay=0.5)
    transform, params = optimizer(config, LAYOUT), tree(0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    step, _ = transform.update(nothing, transform.init(params), params)
    layers = step["stack"]["layers"]
    np.testing.assert_allclose(layers["kernel"], 0.5 * params["stack"]["layers"]["kernel"])
    np.testing.assert_allclose(step["embedding"], 0.5 * params["embedding"])
    assert not layers["scale"].any() and not step["norm"]["scale"].any()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_stack_of_no_layers_is_updated(name):
    transform = optimizer(
        OptimizerConfig(name=name, weight_decay=0.1, depth_rates=[1.0, 0.5]), LAYOUT
    )
    params = tree(0, depth=0)
    step = jax.eval_shape(
        lambda params: transform.update(params, transform.init(params), params)[0], params
    )
    assert jax.tree.map(jnp.shape, step) == jax.tree.map(jnp.shape, params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(step["stack"])} == {0}


def test_the_embedding_is_one_matrix_and_not_a_stack():
    """Its rows share one clipping by RMS, whatever stands on its first axis."""
    transform = layerwise(optax.clip_by_block_rms(1.0), LAYOUT)
    gradients = jax.tree.map(jnp.zeros_like, tree(0))
    gradients["embedding"] = gradients["embedding"].at[0].set(100.0)
    step, _ = transform.update(gradients, transform.init(tree(0)), tree(0))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(step["embedding"] ** 2)), 1.0, rtol=1e-5)


def test_layers_do_not_share_their_clipping():
    transform = layerwise(optax.clip_by_block_rms(1.0), LAYOUT)
    step, _ = transform.update(tree(1), transform.init(tree(0)), tree(0))
    rms = jnp.sqrt(jnp.mean(step["stack"]["layers"]["kernel"] ** 2, axis=(1, 2)))
    np.testing.assert_allclose(rms, 1.0, rtol=1e-2)
