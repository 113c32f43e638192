"""Every kernel computes XLA's attention, keeps documents apart, or says why it does not run."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.models import Decoder, DecoderConfig
from stacking_jax.models.asked import Asked
from stacking_jax.models.kernels import (
    AttentionMask,
    _say_once,
    attention_mask,
    check_documents,
    choose,
    interpreted,
    self_attention,
)
from stacking_jax.models.placement import Unplaced, unconstrained

# No multiple of a block, and more than one; documents that begin within blocks.
LENGTH, FIRST = 200, 70
SEGMENTS = np.repeat([[1, 2, 3, 0]], 2, 0).repeat([FIRST, 65, 40, 25], axis=1).astype(np.int32)
PROMPTS = np.zeros((2, LENGTH), bool)
PROMPTS[0, :50] = PROMPTS[0, FIRST : FIRST + 65] = PROMPTS[1, FIRST : FIRST + 10] = True

CONFIG = DecoderConfig(
    vocab_size=32, num_layers=2, d_model=64, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=16
)
ASKED = Asked(
    "tpu", None, "bfloat16", 8, 1024, 12, 12, 64, True, False, None,
    (("batch", 1), ("length", 1), ("heads", 1), ("keys", 1)),
)
H100 = dataclasses.replace(ASKED, platform="gpu", capability=9.0, max_documents=16)


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, LENGTH, heads, 16) for heads in (4, 2, 2, 4)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def attention(kernel, prompts):
    """(query, key, value, cotangent) -> output and the gradients of the first three, jitted."""
    config = dataclasses.replace(CONFIG, attention=kernel)

    @jax.jit
    def run(query, key, value, cotangent):
        bidirectional = jnp.asarray(PROMPTS) if prompts else None
        mask = attention_mask(config, (2, LENGTH), jnp.asarray(SEGMENTS), bidirectional)
        assert mask.kernel == kernel
        out, pull = jax.vjp(lambda *x: self_attention(*x, mask), query, key, value)
        return out, pull(cotangent)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [False, True], ids=["causal", "prompts"])
@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_a_kernel_is_xla_and_leaks_nothing(kernel, prompts):
    query, key, value, cotangent = arrays()
    want = attention("xla", prompts)(query, key, value, cotangent)
    with interpreted():
        run = attention(kernel, prompts)
        got = run(query, key, value, cotangent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), got, want)

    # Another first document: the others are what they were, to the bit.
    def other(x):
        return x.at[:, :FIRST].multiply(-3.0)

    again, _ = run(other(query), other(key), other(value), cotangent)
    np.testing.assert_array_equal(again[:, FIRST:], got[0][:, FIRST:])
    assert not np.array_equal(again[:, :FIRST], got[0][:, :FIRST])
    # And no gradient of the others reaches it.
    _, gradients = run(query, key, value, cotangent.at[:, :FIRST].set(0.0))
    for gradient in gradients:
        assert not np.any(gradient[:, :FIRST])
        assert np.any(gradient[:, FIRST : FIRST + 65])


@pytest.mark.parametrize("change", ["before", "behind"])
def test_rows_of_which_a_kernel_would_be_wrong_are_not_numbers(change):
    """A prompt that does not lead its document sees what two passes cannot say."""
    prompts = np.array([[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0]], bool)
    segments = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2]], np.int32)
    prompts[1, 3 if change == "before" else 5] = True
    config = dataclasses.replace(CONFIG, attention="splash")
    with interpreted():
        mask = attention_mask(config, (2, 6), jnp.asarray(segments), jnp.asarray(prompts))
    x = mask.guard(jnp.ones((2, 6, 3)))
    assert np.all(x[0] == 1)
    assert np.all(np.isnan(x[1])) == (change == "before")


def test_a_kernel_is_handed_no_dense_mask():
    def sizes(kernel):
        config = dataclasses.replace(CONFIG, attention=kernel)
        with interpreted():
            mask = attention_mask(
                config, (2, LENGTH), jnp.asarray(SEGMENTS), jnp.asarray(PROMPTS)
            )
        return {leaf.size for leaf in jax.tree.leaves(mask)}

    assert max(sizes("splash")) == max(sizes("triton")) == 2 * LENGTH
    assert sizes("xla") == {2 * LENGTH * LENGTH}


def test_what_auto_takes(capsys):
    _say_once.cache_clear()
    assert choose("auto", ASKED) == "splash"
    assert choose("auto", H100) == "cudnn" or "cuDNN is not at hand" in capsys.readouterr().err
    assert choose("auto", dataclasses.replace(ASKED, platform="cpu")) == "xla"
    capsys.readouterr()
    # No bound on the documents, or a card before Hopper: the kernel with segment ids.
    anyhow = dataclasses.replace(H100, max_documents=None)
    assert choose("auto", anyhow) == "triton"
    said = capsys.readouterr().err
    assert "computed by triton" in said and "DecoderConfig.max_documents" in said
    assert choose("auto", anyhow) == "triton" and capsys.readouterr().err == ""
    assert choose("auto", dataclasses.replace(H100, capability=8.0)) == "triton"
    # The length over several devices: splash alone can.
    split = (("batch", 1), ("length", 2), ("heads", 1), ("keys", 1))
    assert choose("auto", dataclasses.replace(ASKED, parts=split)) == "splash"
    assert choose("auto", dataclasses.replace(H100, parts=split)) == "xla"
    assert "divides the length" in capsys.readouterr().err
    assert choose("auto", dataclasses.replace(ASKED, length=64)) == "xla"
    assert "shorter than a block" in capsys.readouterr().err
    assert choose("auto", dataclasses.replace(H100, capability=None)) == "xla"


@pytest.mark.parametrize(
    ("kernel", "change", "part"),
    [
        ("splash", {"platform": "cpu"}, "needs a TPU, and the program is compiled for 'cpu'"),
        ("splash", {"parts": (("batch", 1), ("length", 16), ("heads", 1), ("keys", 1))},
         "parts of 64 tokens"),
        ("splash", {"parts": (("batch", 1), ("length", 1), ("heads", 5), ("keys", 1))},
         "5 devices do not divide the heads of 12"),
        ("splash", {"parts": (("batch", 3), ("length", 1), ("heads", 1), ("keys", 1))},
         "3 devices do not divide the batch of 8"),
        ("splash", {"parts": (("batch", 1), ("length", 1), ("heads", 1), ("keys", 2))},
         "divides 'keys'"),
        ("triton", {"width": 80}, "heads of 80"),
        ("triton", {"platform": "tpu", "capability": None}, "needs an NVIDIA GPU"),
        ("triton", {"capability": 7.5}, "this GPU has 7.5"),
        ("cudnn", {"width": 100}, "heads of 100"),
        ("cudnn", {"dtype": "float32"}, "computes in bfloat16"),
        ("cudnn", {"max_documents": None}, "bind DecoderConfig.max_documents"),
        ("cudnn", {"capability": 8.0}, "needs compute capability 9.0"),
        ("cudnn", {"capability": 8.0, "max_documents": 1, "prompts": True}, "capability 9.0"),
    ],
)
def test_a_named_kernel_that_cannot_is_refused(kernel, change, part):
    asked = dataclasses.replace(ASKED if kernel == "splash" else H100, **change)
    with pytest.raises(UserError, match="or bind 'auto' or 'xla'") as error:
        choose(kernel, asked)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert f"DecoderConfig.attention = {kernel!r}" in str(error.value)


class Hopper(Unplaced):
    """A GPU that is not here, as a mesh of described devices would have it."""

    @property
    def device(self):
        return types.SimpleNamespace(platform="gpu", compute_capability="9.0")


def test_a_program_for_a_gpu_holds_its_kernel():
    """Lowered for CUDA on a machine of CPUs: forward, and the two kernels of the backward."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")

    def gradients(query, key, value):
        mask = attention_mask(config, (2, LENGTH), jnp.asarray(SEGMENTS), None, Hopper())
        out = lambda *x: jnp.sum(self_attention(*x, mask, Hopper()))  # noqa: E731
        return jax.grad(out, (0, 1, 2))(query, key, value)

    query, key, value, _ = (x.astype(jnp.bfloat16) for x in arrays())
    traced = jax.jit(gradients).trace(query, key, value)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert f"{LENGTH}x{LENGTH}" not in text


@pytest.mark.slow
def test_a_decoder_here_refuses_a_kernel_for_elsewhere():
    tokens = jnp.zeros((1, 8), jnp.int32)
    shallow = dataclasses.replace(CONFIG, num_layers=1)
    model = Decoder(dataclasses.replace(shallow, attention="splash"), key=jax.random.key(0))
    with pytest.raises(UserError, match="compiled for 'cpu'"):
        model(tokens)
    with pytest.raises(UserError, match="plain function"):
        model(tokens, constrain=lambda x, names: x)
    # Decoding is XLA's, whatever trains.
    logits, _ = model.decode(tokens, jnp.arange(8)[None], model.init_cache(1, 8, 1))
    plain = Decoder(shallow, key=jax.random.key(0))
    np.testing.assert_allclose(logits, plain(tokens), atol=1e-5)


def test_too_many_documents_are_one_line():
    check_documents(SEGMENTS, 3, "step 7")
    check_documents(np.zeros((2, 5), int), 1, "step 7")
    check_documents(SEGMENTS, None, "step 7")
    with pytest.raises(UserError, match="step 7: a row holds 3 documents.*max_documents = 2"):
        check_documents(SEGMENTS, 2, "step 7")


def test_the_mask_is_a_tree_of_its_arrays():
    mask = attention_mask(CONFIG, (1, 4), jnp.array([[1, 1, 2, 0]]), None, unconstrained)
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 1 and isinstance(jax.tree.unflatten(tree, leaves), AttentionMask)
    assert np.array_equal(mask.guard(jnp.ones((1, 4, 2))), np.ones((1, 4, 2)))
