"""The looping-inspired regulariser: its value, its pull, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training.config import OptimizerConfig
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.similarity import similarity, similarity_term
from stacking_jax.training.similarity_config import GROUPS, SimilarityConfig
from stacking_jax.training.state import initial_state, model_graph
from stacking_jax.training.step import make_train_step

MODEL = DecoderConfig(
    vocab_size=64, num_layers=6, d_model=16, d_ff=32, num_heads=2, stack="scan"
)
OPTIMIZER = make_optimizer(OptimizerConfig(), LAYOUT)


def state_of(depth=6):
    return initial_state(MODEL, OPTIMIZER, depth, seed=0)


LAYERS = state_of().params["stack"]["layers"]


def as_printed(layers, block, groups):
    """Eq. 3 and 4, word for word."""
    depth = layers["mlp"]["gate"].shape[0]
    total = 0.0
    for room, name in (GROUPS[group] for group in groups):
        theta = np.asarray(layers[room][name], np.float64)
        summed = 0.0
        for i in range(depth // block - 1):
            for j in range(block):
                a, b = theta[i * block + j].ravel(), theta[(i + 1) * block + j].ravel()
                summed += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        total += summed / (depth - block)
    return total / len(groups)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("groups", [None, ["attn_q", "ffn_w2"]])
def test_it_is_the_formula_of_the_paper(block, groups):
    got = similarity(LAYERS, block, groups)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, as_printed(LAYERS, block, groups or list(GROUPS)), atol=1e-6)


def test_the_groups_are_all_matrices_of_a_layer():
    matrices = {
        tuple(key.key for key in path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(LAYERS)[0] if leaf.ndim > 2
    }
    assert matrices == set(GROUPS.values())


def test_a_tied_stack_is_alike_at_its_period_alone():
    tied = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 2, 0, 1, 2])], LAYERS)
    np.testing.assert_allclose(similarity(tied, 3), 1.0, atol=1e-6)
    assert similarity(tied, 2) < 0.5
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tied)
    np.testing.assert_allclose(similarity(low, 3), 1.0, atol=1e-6)


def test_zero_matrices_count_as_unlike_and_have_no_gradient():
    silent = jax.tree.map(lambda leaf: leaf, LAYERS)
    silent["mlp"]["down"] = silent["mlp"]["down"].at[3:].set(0.0)
    value, gradient = jax.value_and_grad(lambda layers: similarity(layers, 3))(silent)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient["mlp"]["down"][3:])


def config_of(config, **values):
    return dataclasses.replace(
        config, model=MODEL, growth=dataclasses.replace(config.growth, operator=None),
        similarity=SimilarityConfig(**values),
    )


def test_a_stage_without_a_second_block_has_no_term(config):
    grown = dataclasses.replace(
        config_of(config, weight=1.0, block=2),
        growth=dataclasses.replace(config.growth, operator="midas", num_stages=3),
    )
    terms = [similarity_term(grown, stage) for stage in grown.plan().stages]
    assert [term is None for term in terms] == [True, False, False]
    assert similarity_term(config_of(config), grown.plan().stages[-1]) is None


def batch_of(rows=8, length=16):
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 1, 64)
    ones = jnp.ones_like(tokens)
    return {
        "tokens": tokens, "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(length)[None], tokens.shape),
    }  # fmt: skip


def step_of(config, model=MODEL, **options):
    term = similarity_term(config, config.plan().stages[-1])
    return make_train_step(
        model_graph(model), OPTIMIZER, lambda step: 1e-2, similarity=term, **options
    )


@pytest.mark.slow
def test_the_pull_makes_layers_alike_and_is_no_part_of_the_loss(config):
    plain = jax.jit(step_of(config_of(config)))
    pulled = jax.jit(step_of(config_of(config, weight=10.0, block=2)))
    batch, state = batch_of(), state_of()
    _, without = plain(state, batch)
    assert "similarity" not in without
    state, metrics = pulled(state, batch)
    np.testing.assert_array_equal(metrics["loss"], without["loss"])
    assert metrics["grad_norm"] > without["grad_norm"]
    before = metrics["similarity"]
    np.testing.assert_allclose(before, similarity(LAYERS, 2), atol=1e-6)
    for _ in range(5):
        state, metrics = pulled(state, batch)
    assert metrics["similarity"] > before + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_it_is_added_once_whatever_the_microbatches(config, remat):
    settings = config_of(config, weight=10.0, block=3)
    model = dataclasses.replace(MODEL, remat=remat)
    states = [
        jax.jit(step_of(settings, model, microbatches=parts))(state_of(), batch_of())[1]
        for parts in (1, 4)
    ]
    for name in ("loss", "grad_norm", "similarity"):
        np.testing.assert_allclose(states[0][name], states[1][name], rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(weight=-1.0), "SimilarityConfig.weight must be a number of at least 0"),
        (dict(block=0), "SimilarityConfig.block is a number of layers from 1"),
        (dict(block=0.0), "SimilarityConfig.block is a number of layers from 1"),
        (dict(groups=["attn_q", "norm"]), "or some of attn_q, attn_k"),
        (dict(groups=[]), "SimilarityConfig.groups is None for all"),
    ],
)
def test_settings(values, message):
    with pytest.raises(UserError, match=message):
        SimilarityConfig(**values)


def test_plans():
    check = SimilarityConfig(weight=1.0, block=4).check_plan
    check(Plan.prop(24, 6, 100))
    with pytest.raises(UserError, match="stage 3 has 9 layers, which blocks of .* = 4 do not"):
        check(Plan.prop(12, 4, 100))
    with pytest.raises(UserError, match="block = 4 has no second block in 6 layers"):
        check(Plan.constant(6, 100))
    with pytest.raises(UserError, match="that a looped model has tied"):
        check(LoopConfig(loops=2).apply(Plan.constant(24, 100)))
    SimilarityConfig(block=4).check_plan(Plan.constant(6, 100))
