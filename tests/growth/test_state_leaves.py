"""Telling what the leaves of an optimiser state are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled, layerwise
from stacking_jax.growth.state_leaves import check_shapes, read_state

SCANNED = Scanned("layers")
PARAMS = {"embedding": jnp.ones((4, 3)), "layers": {"value": jnp.ones((2, 3, 4))}}


def by_path(state, layouts=(SCANNED,), params=PARAMS):
    return {leaf.path: leaf for leaf in read_state(state, layouts, params)}


def test_moments_and_counts_of_a_chain():
    chain = optax.chain(optax.clip(1.0), optax.adam(optax.constant_schedule(1.0)))
    read = by_path(chain.init(PARAMS))
    moment = read["1/0/nu/layers/value"]
    assert (moment.owner, moment.field, moment.of_parameter) == (("1", "0"), "nu", True)
    assert (moment.stack, moment.axis, moment.number, moment.per_layer) == (0, 0, None, True)
    count = read["1/0/count"]
    assert (count.owner, count.field, count.of_parameter) == (("1", "0"), "count", False)
    assert not count.per_layer and count.stack is None
    # The schedule's count has another owner, one without moments.
    assert read["1/1/count"].owner == ("1", "1")
    assert read["1/0/mu/embedding"].stack is None


@pytest.mark.parametrize("axis", [0, 1])
def test_under_the_wrapper_everything_is_per_layer_on_axis_0(axis):
    layout = Scanned("layers", axis=axis)
    state = layerwise(optax.chain(optax.scale_by_adam()), layout).init(PARAMS)
    read = by_path((state,), (layout,))
    moment, count = read["0/stacked/layers/0/mu/layers/value"], read["0/stacked/layers/0/count"]
    assert moment.owner == count.owner == ("0", "stacked", "layers", "0")
    assert moment.of_parameter and not count.of_parameter
    assert moment.axis == count.axis == 0 and moment.stack == count.stack == 0
    rest = read["0/rest/0/count"]
    assert rest.stack is None and rest.owner == ("0", "rest", "0")


def test_unrolled_layers_under_the_wrapper_have_owners_of_their_own():
    layout = Unrolled("h/{}")
    params = {"h": [{"w": jnp.ones(3)}, {"w": jnp.ones(3)}]}
    read = by_path(layerwise(optax.scale_by_adam(), layout).init(params), (layout,), params)
    moment = read["stacked/h/1/mu/h/0/w"]
    assert moment.number == 1 and moment.owner == ("stacked", "h", "1") and moment.field == "mu"
    assert read["stacked/h/1/count"].number == 1


def test_boxes_are_looked_through():
    params = {"layers": {"w": nn.Partitioned(jnp.ones((2, 3)), (None, "embed"))}}
    read = by_path(optax.scale_by_adam().init(params), params=params)
    assert read["mu/layers/w/value"].field == "mu" and read["mu/layers/w/value"].axis == 0


def test_states_that_are_plain_dicts():
    state = {"m": PARAMS, "v": PARAMS, "step": jnp.zeros((), int)}
    read = by_path(state)
    assert read["m/layers/value"].field == "m" and read["m/layers/value"].owner == ()
    assert read["step"].stack is None


def test_without_parameters_the_shape_decides_nothing():
    read = by_path(optax.scale_by_adam().init(PARAMS), params=None)
    assert read["mu/layers/value"].axis == 0 and read["mu/layers/value"].field == "mu"


def test_a_leaf_of_another_shape_is_named():
    state = {"nu": {"layers": {"value": jnp.ones((2, 3))}}}
    with pytest.raises(UserError, match=r"nu/layers/value has shape \(2, 3\), its parameter"):
        read_state(state, [SCANNED], PARAMS)


def test_comparing_with_what_the_optimiser_would_make():
    optimizer = optax.adam(0.1)
    check_shapes(optimizer.init(PARAMS), optimizer, PARAMS)
    check_shapes(jax.eval_shape(optimizer.init, PARAMS), optimizer, PARAMS)
    less = jax.tree.map(lambda leaf: leaf[:1], PARAMS)
    with pytest.raises(UserError, match=r"float32\[1, 3\] at 0/mu/embedding, but"):
        check_shapes(optimizer.init(less), optimizer, PARAMS)
