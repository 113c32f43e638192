"""The loss of hidden states against the head matrix, without all logits at once.

Shapes: B batch, L length, D width, V vocabulary. The logits `[B, L, V]` in float32 are the
largest array of a step: 8.4 GB for 16,384 tokens and 128k words. Chunked, a few thousand
tokens have logits at a time, and the gradients of hidden states and head are computed while
they are there (as Liger kernels do, Hsu et al. 2024, arXiv 2410.10989): the same three matrix
products as without chunks, where computing the logits anew in the backward pass takes four.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from stacking_jax.models.decoder import Constrain, unconstrained
from stacking_jax.models.losses import head_logits
from stacking_jax.models.placement import Placement

LOGIT_BYTES = 2**29
"""'auto' chunks the loss where a device's float32 logits take more, into chunks of so much."""

_CHUNK_MULTIPLE = 128
_PLACES = ("batch", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopTargets:
    """A teacher's most probable next tokens.

    Attributes:
      ids: int `[B, L, K]`, those of a token all different.
      probabilities: float `[B, L, K]`; they need not sum to 1.
      elsewhere: float `[B, L]`, the probability of each token that is not among them; None
        for 0.
    """

    ids: jax.Array
    probabilities: jax.Array
    elsewhere: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher's whole distribution, softmax(hidden · kernelᵀ), made chunk by chunk as well.

    For a temperature, divide `hidden` by it.

    Attributes:
      hidden: `[B, L, E]`, normed, before the teacher's head.
      kernel: `[V, E]`.
    """

    hidden: jax.Array
    kernel: jax.Array


SoftTargets = TopTargets | Teacher


def head_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_axis: int,
    z_loss: float | jax.Array = 0.0,
    soft: SoftTargets | None = None,
    soft_weight: float | jax.Array = 0.0,
    chunk: int | None = None,
    constrain: Constrain = unconstrained,
) -> tuple[jax.Array, ...]:
    """Summed objective and summed cross-entropy of the next tokens, in nats.

    The objective of a token is (1 − s) · cross-entropy + s · soft cross-entropy + z · log²(Z),
    with s = `soft_weight`, z = `z_loss`; the soft cross-entropy −Σ q log p differs from the
    divergence from the teacher q by q's entropy, which no gradient sees.

    Args:
      hidden: `[B, L, D]`, normed, in the dtype of the computation.
      kernel: the head in that dtype, `[V, D]` or `[D, V]`.
      targets: int `[B, L]`.
      weights: float `[B, L]`, 1 where a token counts.
      vocab_axis: of the kernel, 0 or 1.
      z_loss: weight of log²(Z) (PaLM, §5).
      soft, soft_weight: what a teacher says (Hinton et al. 2015), and its share.
      chunk: tokens of a device that have logits at a time; None for all of them.
      constrain: places an activation on the mesh by the names of its axes.

    Returns:
      Two float32 scalars, with a teacher three: the summed soft cross-entropy is the last. The
      objective is differentiated in `hidden` and `kernel` alone, once; the others are for
      reading and have no gradient.
    """
    scalars = [jnp.asarray(n, jnp.float32) for n in (z_loss, 0.0 if soft is None else soft_weight)]
    # Whole or chunked, nothing is learnt by these.
    weights, soft, scalars = jax.lax.stop_gradient((weights, soft, scalars))
    if chunk is None:
        logits = head_logits(hidden, kernel, vocab_axis)
        logits = constrain(logits, (*_PLACES, "vocab"))
        terms = _Terms(logits, targets, weights, _distribution(soft, logits, constrain), *scalars)
        objective, *read = (jnp.sum(each) for each in terms.sums)
        return objective, *jax.lax.stop_gradient(read)
    objective, *read = _chunked(
        hidden, kernel, targets, weights, soft, *scalars, vocab_axis, chunk, constrain
    )
    return objective, *jax.lax.stop_gradient(read)


def chunk_of(
    mode: str, chunk: int | None, shape: tuple[int, int], vocab: int,
    constrain: Constrain = unconstrained,
) -> int | None:
    """Tokens of a device that have logits at a time: what `DecoderConfig.loss` asks for.

    Args:
      mode: 'whole', 'chunked', or 'auto': chunked where the logits exceed `LOGIT_BYTES`.
      chunk: `DecoderConfig.loss_chunk`; None for chunks of `LOGIT_BYTES`.
      shape: (B, L).
      vocab: V.
      constrain: of the mesh, which tells how many devices share batch and vocabulary.

    Returns:
      None for all at once.
    """
    rows, columns = parts_of(shape, constrain)
    tokens = shape[0] * shape[1] // (rows * columns)
    parts = _parts(constrain, "vocab")
    bytes_per_token = 4 * (vocab // parts if vocab % parts == 0 else vocab)
    if mode == "whole" or (mode == "auto" and tokens * bytes_per_token <= LOGIT_BYTES):
        return None
    if chunk is None:
        chunk = LOGIT_BYTES // bytes_per_token // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
        chunk = max(chunk, _CHUNK_MULTIPLE)
    return min(chunk, tokens)


# ---- The loss of some logits, and its gradient ---------------------------------------------


class _Terms:
    """The losses of tokens whose logits are `[..., V]`, and what they are made of.

    Attributes:
      sums: float32 `[...]`, weighted, to be added up: objective, cross-entropy and, with a
        teacher, soft cross-entropy.
    """

    def __init__(self, logits, targets, weights, soft, z_loss, soft_weight):
        self.weights, self.soft = weights, soft
        self.z_loss, self.soft_weight = z_loss, soft_weight
        words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        # A comparison is fused into the passes that are made anyway, and needs nothing from
        # the devices that hold other words; a gather is neither.
        self.hit = words == targets[..., None]
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        self.exponentials = jnp.exp(logits - highest)
        self.total = jnp.sum(self.exponentials, axis=-1)
        self.log_z = jnp.log(self.total) + highest[..., 0]
        each = self.log_z - jnp.sum(jnp.where(self.hit, logits, 0.0), axis=-1)
        read = [each * weights]
        if soft is not None:
            self.mass = jnp.sum(soft, axis=-1)
            towards = self.log_z * self.mass - jnp.sum(soft * logits, axis=-1)
            each = (1 - soft_weight) * each + soft_weight * towards
            read.append(towards * weights)
        self.sums = ((each + z_loss * jnp.square(self.log_z)) * weights, *read)

    def gradient(self):
        """Of the summed objective in the logits."""
        pull = 1.0 + 2.0 * self.z_loss * self.log_z
        if self.soft is not None:
            pull += self.soft_weight * (self.mass - 1.0)
        wanted = jnp.where(self.hit, (self.weights * (1 - self.soft_weight))[..., None], 0.0)
        if self.soft is not None:
            wanted += (self.weights * self.soft_weight)[..., None] * self.soft
        return self.exponentials * (self.weights * pull / self.total)[..., None] - wanted


def _distribution(soft, logits, constrain):
    """A teacher's probabilities, float32 `[..., V]` like the logits, or None."""
    if soft is None:
        return None
    if isinstance(soft, TopTargets):
        others = jnp.zeros_like(logits)
        if soft.elsewhere is not None:
            others += soft.elsewhere.astype(jnp.float32)[..., None]
        probabilities = soft.probabilities.astype(jnp.float32)
        return jnp.put_along_axis(others, soft.ids, probabilities, axis=-1, inplace=False)
    places = (*_PLACES, *[None] * (logits.ndim - 3))
    return jax.nn.softmax(
        constrain(head_logits(soft.hidden, soft.kernel, 0), (*places, "vocab")), axis=-1
    )


# ---- In chunks --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _chunked(
    hidden, kernel, targets, weights, soft, z_loss, soft_weight, vocab_axis, chunk, constrain
):
    return _run(
        hidden, kernel, targets, weights, soft, z_loss, soft_weight, vocab_axis, chunk, constrain,
        with_gradients=False,
    )[0]


def _chunked_forward(
    hidden, kernel, targets, weights, soft, z_loss, soft_weight, vocab_axis, chunk, constrain
):
    return _run(
        hidden, kernel, targets, weights, soft, z_loss, soft_weight, vocab_axis, chunk, constrain,
        with_gradients=True,
    )


def _chunked_backward(vocab_axis, chunk, constrain, gradients, cotangents):
    del vocab_axis, chunk, constrain
    scaled = [(leaf * cotangents[0]).astype(leaf.dtype) for leaf in gradients]
    return (*scaled, None, None, None, None, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _run(
    hidden, kernel, targets, weights, soft, z_loss, soft_weight, vocab_axis, chunk, constrain,
    *, with_gradients,
):  # fmt: skip
    """(what `head_loss` returns, gradients in `hidden` and `kernel`, or None)."""
    parts = parts_of(hidden.shape[:2], constrain)
    names = ("vocab", "stream") if vocab_axis == 0 else ("stream", "vocab")
    # Gathered over D once, as every other weight is, and not in every turn of the loop.
    kernel = constrain(kernel, names)
    teacher = None
    if isinstance(soft, Teacher):
        teacher, soft = constrain(soft.kernel, ("vocab", "stream")), soft.hidden
    by_token = (hidden, targets, weights, soft)
    by_chunk = jax.tree.map(lambda leaf: cut(leaf, parts, chunk, constrain), by_token)

    def one_chunk(carry, tokens):
        sums, of_kernel = carry
        hidden, targets, weights, soft = tokens
        logits = head_logits(hidden, kernel, vocab_axis)
        logits = constrain(logits, (*_PLACES, None, "vocab"))
        soft = Teacher(soft, teacher) if teacher is not None else soft
        terms = _Terms(
            logits, targets, weights, _distribution(soft, logits, constrain), z_loss, soft_weight
        )
        sums = tuple(
            total + each.sum(axis=2) for total, each in zip(sums, terms.sums, strict=True)
        )
        if not with_gradients:
            return (sums, None), None
        low = terms.gradient().astype(hidden.dtype)
        into_hidden, into_kernel = _products(vocab_axis)
        of_hidden = jnp.einsum(into_hidden, low, kernel).astype(hidden.dtype)
        # Every device adds up what its own tokens give; they meet once, after the last chunk.
        of_kernel += jnp.einsum(into_kernel, low, hidden, preferred_element_type=jnp.float32)
        return (sums, of_kernel), of_hidden

    zeros = constrain(jnp.zeros(parts, jnp.float32), _PLACES)
    of_kernel = None
    if with_gradients:
        of_kernel = jnp.zeros((*parts, *kernel.shape), jnp.float32)
        of_kernel = constrain(of_kernel, (*_PLACES, *names))
    zeros = (zeros,) * (2 if soft is None else 3)
    (sums, of_kernel), of_hidden = jax.lax.scan(one_chunk, (zeros, of_kernel), by_chunk)
    sums = jax.tree.map(jnp.sum, sums)
    if not with_gradients:
        return sums, None
    of_kernel = jnp.sum(of_kernel, axis=(0, 1)).astype(kernel.dtype)
    of_kernel = constrain(of_kernel, tuple("embed" if n == "stream" else n for n in names))
    return sums, (join(of_hidden, hidden.shape, parts, constrain), of_kernel)


def _products(vocab_axis: int) -> tuple[str, str]:
    """How the gradient of logits `[P, Q, tokens, V]` goes on into hidden states and kernel."""
    kernel = "vd" if vocab_axis == 0 else "dv"
    return f"pqtv,{kernel}->pqtd", f"pqtv,pqtd->pq{kernel}"


def cut(x, parts, chunk, constrain):
    """`[B, L, ...]` as `[chunks, P, Q, tokens, ...]`: every device cuts what it has.

    P and Q are the parts of rows and columns that the mesh makes; padded with zeros.
    """
    (p, q), (rows, columns), rest = parts, x.shape[:2], x.shape[2:]
    x = x.reshape(p, rows // p, q, columns // q, *rest).swapaxes(1, 2)
    tokens = rows * columns // (p * q)
    chunks = -(-tokens // chunk)
    chunk = -(-tokens // chunks)
    x = x.reshape(p, q, tokens, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * len(rest))
    x = jnp.moveaxis(x.reshape(p, q, chunks, chunk, *rest), 2, 0)
    return constrain(x, (None, *_PLACES, None, *[None] * len(rest)))


def join(x, shape, parts, constrain, last="stream"):
    """`cut` undone, for an array `[B, L, D]`; `last` is the name of its last axis."""
    (p, q), (rows, columns) = parts, shape[:2]
    x = jnp.moveaxis(x, 0, 2).reshape(p, q, -1, shape[2])
    x = x[:, :, : rows * columns // (p * q)]
    x = x.reshape(p, q, rows // p, columns // q, shape[2]).swapaxes(1, 2)
    return constrain(x.reshape(shape), (*_PLACES, last))


def parts_of(shape, constrain) -> tuple[int, int]:
    """Into how many parts the mesh cuts rows and columns; 1 where it does not divide them."""
    parts = [_parts(constrain, name) for name in _PLACES]
    return tuple(n if size % n == 0 else 1 for n, size in zip(parts, shape, strict=True))


def _parts(constrain, name: str) -> int:
    """Of a plain function, which knows no mesh: 1."""
    return constrain.parts(name) if isinstance(constrain, Placement) else 1
