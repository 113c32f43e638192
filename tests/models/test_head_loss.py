"""The chunked loss against plain arithmetic: values, gradients, devices, memory."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from stacking_jax.models.head_loss import (
    LOGIT_BYTES,
    Teacher,
    TopTargets,
    chunk_of,
    head_loss,
)
from stacking_jax.models.losses import cross_entropy
from stacking_jax.training import MeshConfig, sharding

QUICKLY = {"xla_backend_optimization_level": 0}


def draw(seed, rows, columns, width, vocab, vocab_axis=0, dtype=np.float32):
    """Hidden states, head, targets and weights of which some are 0, as padding has them."""
    dice = np.random.default_rng(seed)
    shape = (vocab, width) if vocab_axis == 0 else (width, vocab)
    return (
        jnp.asarray(2 * dice.normal(size=(rows, columns, width)), dtype),
        jnp.asarray(dice.normal(size=shape), dtype),
        jnp.asarray(dice.integers(0, vocab, (rows, columns)), jnp.int32),
        jnp.asarray(dice.random((rows, columns)) > 0.3, jnp.float32),
    )


def teacher(kind, seed, rows, columns, vocab):
    dice = np.random.default_rng(seed + 1)
    if kind == "top":
        ids = np.argsort(dice.random((rows, columns, vocab)), axis=-1)[..., : min(3, vocab)]
        return TopTargets(jnp.asarray(ids), jnp.asarray(0.3 * dice.random(ids.shape), np.float32))
    if kind == "whole":
        hidden, kernel = dice.normal(size=(rows, columns, 5)), dice.normal(size=(vocab, 5))
        return Teacher(*(jnp.asarray(array, np.float32) for array in (hidden, kernel)))
    return None


def by_hand(hidden, kernel, targets, weights, *, vocab_axis, z_loss, soft, soft_weight):
    """The same in plain jax.numpy, every array whole, differentiated by JAX."""
    logits = hidden @ (kernel.T if vocab_axis == 0 else kernel)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    read = [jnp.sum(each * weights)]
    if isinstance(soft, TopTargets):
        q = jnp.sum(
            jax.nn.one_hot(soft.ids, logits.shape[-1]) * soft.probabilities[..., None], axis=-2
        )
    elif soft is not None:
        q = jax.nn.softmax(soft.hidden @ soft.kernel.T)
    if soft is not None:
        towards = -jnp.sum(q * jax.nn.log_softmax(logits), axis=-1)
        each = (1 - soft_weight) * each + soft_weight * towards
        read.append(jnp.sum(towards * weights))
    z = z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum((each + z) * weights), *read


def graded(function, **settings):
    """((objective, what is read), gradients in hidden and kernel), divided as a step divides."""

    def scaled(hidden, kernel, targets, weights):
        objective, *read = function(hidden, kernel, targets, weights, **settings)
        return objective / 7, tuple(read)

    return jax.jit(
        jax.value_and_grad(scaled, (0, 1), has_aux=True), compiler_options=QUICKLY
    )


def assert_close(actual, expected, tolerance=1e-5):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(want))) + 1e-6
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**16), rows=st.integers(1, 3), columns=st.integers(1, 7),
    width=st.integers(1, 8), vocab=st.integers(2, 40), vocab_axis=st.integers(0, 1),
    z_loss=st.sampled_from([0.0, 1e-2]), kind=st.sampled_from([None, "top", "whole"]),
    soft_weight=st.sampled_from([0.3, 1.0]), chunk=st.sampled_from([None, 1, 4, 100]),
)
@settings(max_examples=12, deadline=None)
def test_values_and_gradients_are_those_of_the_plain_loss(
    seed, rows, columns, width, vocab, vocab_axis, z_loss, kind, soft_weight, chunk
):
    arrays = draw(seed, rows, columns, width, vocab, vocab_axis)
    soft = teacher(kind, seed, rows, columns, vocab)
    shared = dict(vocab_axis=vocab_axis, z_loss=z_loss, soft=soft, soft_weight=soft_weight)
    want = graded(by_hand, **shared)(*arrays)
    assert_close(graded(head_loss, chunk=chunk, **shared)(*arrays), want)


@pytest.mark.parametrize("chunk", [None, 4])
def test_it_is_the_loss_that_evaluation_reports(chunk):
    hidden, kernel, targets, weights = arrays = draw(3, 2, 6, 8, 30)
    want = cross_entropy(hidden @ kernel.T, targets, weights, 1e-2)
    objective, cross = head_loss(*arrays, vocab_axis=0, z_loss=1e-2, chunk=chunk)
    np.testing.assert_allclose(cross, want[0], rtol=1e-6)
    np.testing.assert_allclose(objective, sum(want), rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_cross_entropy_is_for_reading(chunk):
    hidden, *rest = draw(3, 2, 6, 8, 30)
    of = jax.grad(lambda hidden: head_loss(hidden, *rest, vocab_axis=0, chunk=chunk)[1])(hidden)
    assert not of.any()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", ["top", "whole"])
def test_a_teacher_learns_nothing(kind, chunk):
    arrays, soft = draw(3, 2, 6, 8, 30), teacher(kind, 3, 2, 6, 30)

    def loss(soft, weights):
        return head_loss(
            *arrays[:3], weights, vocab_axis=0, soft=soft, soft_weight=0.5, chunk=chunk
        )[0]

    of = jax.grad(loss, (0, 1), allow_int=True)(soft, arrays[3])
    assert not any(leaf.any() for leaf in jax.tree.leaves(of) if leaf.dtype == jnp.float32)


@pytest.mark.parametrize("chunk", [None, 4])
def test_tokens_without_weight_do_not_count(chunk):
    hidden, kernel, targets, weights = draw(4, 2, 6, 8, 30)
    run = graded(head_loss, vocab_axis=0, z_loss=1e-2, chunk=chunk)
    want = run(hidden, kernel, targets, weights)
    noise = jnp.where(weights[..., None] > 0, hidden, 50.0)
    got = run(noise, kernel, (targets + (weights == 0)) % 30, weights)
    assert_close(got, want)
    (objective, (cross,)), gradients = run(hidden, kernel, targets, 0 * weights)
    assert objective == cross == 0 and not any(leaf.any() for leaf in gradients)


@pytest.mark.parametrize("chunk", [None, 4])
def test_bfloat16_is_multiplied_low_and_summed_high(chunk):
    arrays = draw(5, 2, 64, 16, 300, dtype=jnp.bfloat16)
    run = graded(head_loss, vocab_axis=0, z_loss=1e-3, chunk=chunk)
    (objective, (cross,)), (of_hidden, of_kernel) = run(*arrays)
    assert objective.dtype == cross.dtype == jnp.float32
    assert of_hidden.dtype == of_kernel.dtype == jnp.bfloat16
    high = [array.astype(jnp.float32) for array in arrays[:2]]
    want = run(*high, *arrays[2:])
    assert_close((objective, cross), want[0], 1e-5)
    assert_close((of_hidden, of_kernel), want[1], 1e-2)
    # No product takes the float32 gradient of the logits.
    taken = products(jax.make_jaxpr(run.__wrapped__)(*arrays).jaxpr)
    assert [var.aval.dtype for pair in taken for var in pair] == 6 * [jnp.bfloat16]


def products(jaxpr):
    """The factors of all matrix products of a program."""
    here = [tuple(eqn.invars) for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    inner = (sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))
    return here + [pair for sub in inner for pair in products(sub)]


def test_no_array_holds_the_logits_of_all_tokens():
    rows, columns, width, vocab, chunk = 4, 256, 16, 1000, 64
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw(0, rows, columns, width, vocab)]

    def temporaries(chunk):
        run = graded(head_loss, vocab_axis=0, z_loss=1e-3, chunk=chunk)
        compiled = run.lower(*arrays).compile()
        assert (f"[{rows},{columns},{vocab}]" in compiled.as_text()) == (chunk is None)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunk) < temporaries(None) / 4


def test_the_gradient_takes_three_products_and_a_value_one():
    arrays = draw(0, 2, 64, 16, 100)
    loss = functools.partial(head_loss, vocab_axis=0, chunk=32)
    value = jax.make_jaxpr(loss)(*arrays)
    gradient = jax.make_jaxpr(jax.grad(lambda *a: loss(*a)[0], (0, 1)))(*arrays)
    assert len(products(value.jaxpr)) == 1
    assert len(products(gradient.jaxpr)) == 3


# ---- Devices ----------------------------------------------------------------------------------


def on(config: MeshConfig):
    size = np.prod([getattr(config, axis) for axis in sharding.make_mesh(MeshConfig()).axis_names])
    return sharding.make_mesh(config, jax.devices()[: int(size)])


def placed(mesh, arrays):
    names = (
        ("batch", "length", "stream"), ("vocab", "embed"), ("batch", "length"), ("batch", "length")
    )
    where = [mesh.sharding(axes) for axes in names]
    return where, [jax.device_put(a, w) for a, w in zip(arrays, where, strict=True)]


MESHES = [
    MeshConfig(fsdp=8), MeshConfig(fsdp=1, tensor=8), MeshConfig(fsdp=2, sequence=2, tensor=2),
    MeshConfig(data=2, fsdp=2, slice=2),
]


@pytest.mark.parametrize("kind", [None, "top", "whole"])
@pytest.mark.parametrize("config", MESHES, ids=["fsdp", "tensor", "three", "replicas"])
def test_every_mesh_gives_what_one_device_gives(config, kind):
    if kind == "whole" and config.tensor == 8:
        pytest.skip("the mesh of three axes has it")
    arrays = draw(1, 8, 6, 8, 48)
    shared = dict(
        vocab_axis=0, z_loss=1e-2, chunk=4, soft=teacher(kind, 1, 8, 6, 48), soft_weight=0.4
    )
    mesh = on(config)
    _, there = placed(mesh, arrays)
    got = graded(head_loss, constrain=sharding.constrainer(mesh), **shared)(*there)
    assert_close(got, graded(head_loss, **shared)(*arrays), 2e-6)


def collectives(config, chunk, rows=8):
    """(kind, shape of the result, whether in the loop) of the compiled loss and its gradient."""
    mesh = on(config)
    where, there = placed(mesh, draw(1, rows, 64, 16, 320))
    run = graded(
        head_loss, vocab_axis=0, z_loss=1e-3, chunk=chunk, constrain=sharding.constrainer(mesh)
    )
    text = run.lower(*there).compile().as_text()
    found, entry = [], False
    for line in text.splitlines():
        entry = line.startswith("ENTRY") or (entry and not line.startswith("}"))
        match = re.search(
            r"= \(?(\w+\[[\d,]*\]).*? (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
            line,
        )
        if match:
            found.append((match[2], match[1], not entry))
    return found


def test_the_batch_stays_where_it_is():
    """Under fsdp the head alone is gathered, and its gradient meets once, behind the loop."""
    found = collectives(MeshConfig(fsdp=8), chunk=16)
    assert not any(in_loop for *_, in_loop in found)
    gathered = [shape for kind, shape, _ in found if kind == "all-gather"]
    assert gathered == ["f32[320,16]"]
    # The sum of the head's gradient, and scalars.
    rest = {shape for kind, shape, _ in found if kind != "all-gather"}
    assert rest <= {"f32[]", "f32[320,16]", "f32[320,2]", "f32[8,320,2]", "f32[1,1,320,16]"}
    assert not any(kind in ("all-to-all", "collective-permute") for kind, *_ in found)


def test_words_stay_on_their_devices():
    """Over a split vocabulary go a few numbers per token, and the gradient of hidden states."""
    found = collectives(MeshConfig(fsdp=1, tensor=8), chunk=16)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    largest = max(
        int(np.prod([int(n) for n in re.findall(r"\d+", shape.split("[")[1])] or [1]))
        for _, shape, _ in found
    )
    assert largest <= 16 * 16, "a chunk's hidden states"


# ---- Chosen by size ---------------------------------------------------------------------------


def test_auto_goes_by_the_logits_of_a_device():
    tokens = LOGIT_BYTES // 4 // 32_000
    small, large = (tokens // 1000, 1000), (tokens // 1000 + 1, 1000)
    assert chunk_of("auto", None, small, 32_000) is None
    assert chunk_of("auto", None, large, 32_000) == tokens // 128 * 128
    assert chunk_of("whole", None, large, 32_000) is None
    assert chunk_of("chunked", 512, small, 32_000) == 512
    assert chunk_of("chunked", 512, (2, 16), 32_000) == 32, "no more than there are"
    constrain = sharding.constrainer(on(MeshConfig(fsdp=2, tensor=4)))
    # Eight devices hold an eighth each.
    assert chunk_of("auto", None, (8 * small[0], 1000), 32_000, constrain) is None
    assert chunk_of("auto", None, (8 * large[0], 1000), 32_000, constrain) is not None
