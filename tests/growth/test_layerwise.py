"""A transform run per layer: the same in every layout, with counts of its own per layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled, layerwise, to_layerwise

LAYOUTS = {
    "axis 0": Scanned("layers"), "axis 1": Scanned("layers", axis=1),
    "dict": Unrolled("layers_{}"), "list": Unrolled("h/{}"),
}
TRANSFORMS = {
    "adam": optax.scale_by_adam,
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "lamb": lambda: optax.lamb(0.1),
}


def tree(seed: int, kind: str, depth: int = 3) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    size = 10.0 ** jnp.arange(depth, dtype=jnp.float32)[:, None, None]
    kernel = size * jax.random.normal(keys[0], (depth, 5, 6))
    bias = jax.random.normal(keys[1], (depth, 6))
    rest = {"embedding": jax.random.normal(keys[2], (7, 5))}
    if kind == "axis 0":
        return rest | {"layers": {"bias": bias, "kernel": kernel}}
    if kind == "axis 1":
        moved = {"bias": jnp.moveaxis(bias, 0, 1), "kernel": jnp.moveaxis(kernel, 0, 1)}
        return rest | {"layers": moved}
    each = [{"bias": bias[i], "kernel": kernel[i]} for i in range(depth)]
    if kind == "list":
        return rest | {"h": each}
    return rest | {f"layers_{i}": layer for i, layer in enumerate(each)}


def kernels(params: dict, kind: str) -> jax.Array:
    if kind == "axis 0":
        return params["layers"]["kernel"]
    if kind == "axis 1":
        return jnp.moveaxis(params["layers"]["kernel"], 1, 0)
    layers = params["h"] if kind == "list" else [params[f"layers_{i}"] for i in range(3)]
    return jnp.stack([layer["kernel"] for layer in layers])


def run(transform, kind, steps=3):
    params = tree(0, kind)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for seed in range(1, steps + 1):
        step, state = update(tree(seed, kind), state, params)
    return step, state


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_what_separate_leaves_give(name, kind):
    plain, _ = run(TRANSFORMS[name](), "list")
    got, _ = run(layerwise(TRANSFORMS[name](), LAYOUTS[kind]), kind)
    assert jax.tree.structure(got) == jax.tree.structure(tree(0, kind))
    np.testing.assert_allclose(kernels(got, kind), kernels(plain, "list"), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(got["embedding"], plain["embedding"], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["axis 0", "axis 1"])
def test_every_layer_counts_for_itself(kind):
    _, state = run(layerwise(optax.scale_by_adam(), LAYOUTS[kind]), kind)
    assert state.stacked["layers"].count.tolist() == [3, 3, 3] and int(state.rest.count) == 3
    # The layers come first, whatever the parameters' axis.
    assert state.stacked["layers"].mu["layers"]["kernel"].shape == (3, 5, 6)


def test_layers_of_an_unrolled_stack_are_each_called_the_first():
    """So that a layer's state fits wherever the layer goes."""
    _, state = run(layerwise(optax.scale_by_adam(), LAYOUTS["list"]), "list")
    structures = {str(jax.tree.structure(layer)) for layer in state.stacked["h"].values()}
    assert list(state.stacked["h"]) == ["0", "1", "2"] and len(structures) == 1


def test_several_stacks_by_name():
    layouts = {"encoder": Scanned("encoder/layers"), "decoder": Unrolled("decoder/layers_{}")}
    params = {"encoder": tree(0, "axis 0"), "decoder": tree(1, "dict")}
    transform = layerwise(optax.scale_by_trust_ratio(), layouts)
    state = transform.init(params)
    assert set(state.stacked) == {"encoder", "decoder"}
    step, _ = transform.update(params, state, params)
    alone, _ = layerwise(optax.scale_by_trust_ratio(), LAYOUTS["dict"]).update(
        params["decoder"], layerwise(optax.scale_by_trust_ratio(), LAYOUTS["dict"]).init(
            params["decoder"]), params["decoder"])
    np.testing.assert_allclose(kernels(step["decoder"], "dict"), kernels(alone, "dict"), rtol=1e-6)


@pytest.mark.parametrize("container", ["FrozenDict", "boxes", "NNX state"])
def test_containers_of_flax(container):
    params = tree(0, "axis 0")
    if container == "FrozenDict":
        params = FrozenDict(params)
    elif container == "boxes":
        params = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params)
    else:
        params = nnx.State(jax.tree.map(nnx.Param, params))
    transform = layerwise(optax.scale_by_param_block_rms(), LAYOUTS["axis 0"])
    step, _ = transform.update(params, transform.init(params), params)
    assert jax.tree.structure(step) == jax.tree.structure(params)
    plain = tree(0, "axis 0")
    want, _ = transform.update(plain, transform.init(plain), plain)
    for one, other in zip(jax.tree.leaves(step), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


def test_further_arguments_are_handed_on():
    def update(updates, state, params=None, *, value, **rest):
        return jax.tree.map(lambda leaf: leaf * value, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    transform = layerwise(scaled, LAYOUTS["axis 0"])
    params = tree(0, "axis 0")
    step, _ = transform.update(params, transform.init(params), params, value=2.0)
    np.testing.assert_allclose(step["layers"]["kernel"], 2 * params["layers"]["kernel"])


def test_a_tree_without_the_stack_is_refused():
    with pytest.raises(UserError, match="no leaf of the parameters lies in Scanned"):
        layerwise(optax.scale_by_adam(), Scanned("blocks")).init(tree(0, "axis 0"))
    with pytest.raises(UserError, match="a layout is Scanned"):
        layerwise(optax.scale_by_adam(), "layers")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_state_without_wrapper_goes_on_with_it(kind):
    chain = optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    _, plain = run(chain, kind)
    _, wrapped = run(layerwise(chain, LAYOUTS[kind]), kind)
    turned = to_layerwise(plain, chain, tree(0, kind), LAYOUTS[kind])
    assert jax.tree.structure(turned) == jax.tree.structure(wrapped)
    for one, other in zip(jax.tree.leaves(turned), jax.tree.leaves(wrapped), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_state_that_mixed_the_layers_cannot_go_on():
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=3)
    params = tree(0, "axis 0")
    with pytest.raises(UserError, match="does not fall into layers"):
        to_layerwise(factored.init(params), factored, params, LAYOUTS["axis 0"])
    with pytest.raises(UserError, match="holds no nu/layers/bias; is it another's"):
        to_layerwise(optax.scale_by_lion().init(params), optax.scale_by_adam(), params,
                     LAYOUTS["axis 0"])
