"""The decoder's shape, its parameter counts and FLOPs."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from stacking_jax.errors import UserError
from stacking_jax.models import Decoder, DecoderConfig

BASE = dict(vocab_size=64, num_layers=4, d_model=32, d_ff=48, num_heads=4)
SHAPES = {
    "tied": {},
    "untied": dict(tied_embeddings=False),
    "grouped": dict(num_kv_heads=2),
    "multi-query, untied": dict(num_kv_heads=1, tied_embeddings=False),
    "wide heads": dict(head_dim=16),
    "heads that do not divide": dict(num_heads=3, head_dim=10),
}


def matmul_flops(jaxpr) -> int:
    """2·m·n·k of every matrix product, exactly."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        total += sum(matmul_flops(inner) for inner in jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parameters_are_those_of_a_built_decoder(name, depth):
    config = DecoderConfig(**BASE | SHAPES[name])
    model = jax.eval_shape(lambda key: Decoder(config, depth=depth, key=key), jax.random.key(0))
    built = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert config.costs(128).params(depth) == built


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_flops_are_those_of_the_matrix_products(name, depth):
    config = DecoderConfig(**BASE | SHAPES[name], stack="unroll")
    batch, length = 2, 24
    model = jax.eval_shape(lambda key: Decoder(config, depth=depth, key=key), jax.random.key(0))
    forward = jax.make_jaxpr(lambda model, tokens: model(tokens))(
        model, jnp.zeros((batch, length), jnp.int32)
    )
    # flops_per_token counts forward and backward: three forward passes.
    by_formula = config.costs(length).flops_per_token(depth) / 3 * batch * length
    assert matmul_flops(forward.jaxpr) == by_formula


def test_flops_agree_with_the_compilers_own_count():
    config = DecoderConfig(
        vocab_size=512, num_layers=3, d_model=256, d_ff=768, num_heads=2, stack="unroll"
    )
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(model, tokens):
        return jnp.sum(jax.nn.logsumexp(model(tokens), axis=-1))

    forward = jax.jit(loss).lower(model, tokens).compile().cost_analysis()["flops"]
    step = jax.jit(jax.grad(loss)).lower(model, tokens).compile().cost_analysis()["flops"]
    predicted = config.costs(64).flops_per_token(3) * 64
    assert forward == pytest.approx(predicted / 3, rel=0.04)
    # The compiler's count has the parts that are no matrix product, too.
    assert step == pytest.approx(predicted, rel=0.06)


def test_the_papers_models_have_the_papers_sizes():
    one_b = DecoderConfig(vocab_size=32_128, num_layers=24, d_model=2048, d_ff=5120, num_heads=32)
    eight_b = dataclasses.replace(one_b, num_layers=72, d_ff=16_384, num_heads=16)
    assert 24 * one_b.costs(1280).layer_params == pytest.approx(1.158e9, rel=0.01)
    assert 72 * eight_b.costs(1280).layer_params == pytest.approx(8.46e9, rel=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=5), "5 heads do not divide a width of 32"),
        (dict(num_kv_heads=3), "3 key/value heads do not divide 4 query heads"),
        (dict(num_kv_heads=8), "8 key/value heads do not divide 4"),
        (dict(num_heads=32), "head width of 1 must be even"),
        (dict(head_dim=7), "head width of 7 must be even"),
        (dict(num_kv_heads=0), "num_kv_heads must be a positive whole number; got 0"),
        (dict(num_kv_heads=-1), "num_kv_heads must be a positive whole number"),
        (dict(head_dim=0), "head_dim must be a positive whole number"),
        (dict(d_model=0), "d_model must be a positive whole number"),
        (dict(num_layers=True), "num_layers must be a positive whole number"),
        (dict(vocab_size=64.0), "vocab_size must be a positive whole number"),
        (dict(d_ff="48"), "d_ff must be a positive whole number"),
        (dict(dtype="float16"), "dtype is one of float32, bfloat16; got 'float16'"),
        (dict(stack="loop"), "stack is one of auto, scan, unroll"),
        (dict(remat="some"), "remat is one of none, dots, minimal, full, offload"),
        (dict(loss="half"), "loss is one of auto, whole, chunked"),
        (dict(loss_chunk=0), "loss_chunk must be a positive whole number"),
        (dict(scan_unroll=0), "scan_unroll must be a positive whole number"),
        (dict(rope_theta=0.0), "rope_theta must be positive"),
        (dict(norm_epsilon=-1e-6), "norm_epsilon must be positive"),
    ],
)
def test_sizes_that_do_not_fit_together(change, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**BASE | change)
