"""Stacks of attention alone, tied or not, run by `growth.run_stack`.

The model of von Oswald et al. 2023, Ahn et al. 2023 and Gatmiry et al. 2024: tokens
(x_i, y_i), no MLP, no norms; one layer is z ← z − P · (1/n) Σ_j z_j z_jᵀ Q z_i over the n pairs j,
and the prediction is minus the query's last entry. *Restricted* stacks train the blocks that a
gradient step needs and no others: Q = [[A, 0], [0, 0]], P = [[0, 0], [uᵀ, 1]]. With u = 0 a layer
is exactly one step of gradient descent with preconditioner A.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from stacking_jax.growth import loop, run_stack
from stacking_jax.lab.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class Stack:
    """An architecture.

    Attributes:
      attention: `linear`, or `softmax` over the pairs.
      tied: one layer runs `depth` times.
      restricted: A and u alone are trained (and a scale of the output with softmax, which linear
        attention has in A).
      depth: positions.
      injection: the prompt is added to what a layer reads, and the residual stream starts at
        zero. Gradient descent is the same with it and without; other algorithms are not.
    """

    attention: str
    tied: bool
    restricted: bool
    depth: int
    injection: bool = False

    @property
    def arm(self) -> str:
        """The name without the depth, such as 'linear restricted tied'."""
        words = [self.attention, "restricted" if self.restricted else "full"]
        words.append("tied" if self.tied else "untied")
        return " ".join(words + ["injected"] * self.injection)


def init(stack: Stack, key: jax.Array, dimension: int, scale: float) -> dict[str, jax.Array]:
    """Stacked parameters `[stored, ...]`, normal with standard deviation `scale`."""
    stored = 1 if stack.tied else stack.depth
    wide = dimension + 1
    first, second = jax.random.split(key)
    if not stack.restricted:
        return {
            "p": scale * jax.random.normal(first, (stored, wide, wide)),
            "q": scale * jax.random.normal(second, (stored, wide, wide)),
        }
    layers = {
        "a": scale * jax.random.normal(first, (stored, dimension, dimension)),
        "u": scale * jax.random.normal(second, (stored, dimension)),
    }
    if stack.attention == "softmax":
        layers["scale"] = jnp.ones((stored,))
    return layers


def predict(
    stack: Stack, layers: dict[str, jax.Array], tokens: jax.Array, depth: int | None = None
) -> jax.Array:
    """Predictions for the queries.

    Args:
      layers: as of `init`.
      tokens: `[batch, n + 1, d + 1]`.
      depth: how many positions run, in place of the stack's own: more and fewer loops of a tied
        stack, the first layers of another.

    Returns:
      `[batch]`.
    """
    return -_run(stack, layers, tokens, depth, every=False)[:, -1, -1]


def predict_each(
    stack: Stack, layers: dict[str, jax.Array], tokens: jax.Array, depth: int | None = None
) -> jax.Array:
    """Predictions read after every position: `[positions, batch]`."""
    return _run(stack, layers, tokens, depth, every=True)


def _run(stack, layers, tokens, depth, every):
    depth = stack.depth if depth is None else depth
    pairs = tokens.shape[1] - 1

    def body(layer, z):
        p, q = _matrices(layer)
        read = z + tokens if stack.injection else z
        context = read[:, :pairs]
        asked = read @ q.T
        if stack.attention == "softmax":
            weights = jax.nn.softmax(jnp.einsum("bid,bjd->bij", asked, context), axis=-1)
            mixed = weights @ context
        else:
            moment = jnp.einsum("bjd,bje->bde", context, context) / pairs
            mixed = asked @ moment
        return z - mixed @ p.T

    def reading(layer, z, _):
        z = body(layer, z)
        return z, -z[:, -1, -1]

    start = jnp.zeros_like(tokens) if stack.injection else tokens
    depth_map = loop(1, depth) if stack.tied else tuple(range(depth))
    # Scanned, not unrolled: compiling takes longer than a training of this size.
    if not every:
        return run_stack(body, layers, start, depth_map)
    return run_stack(reading, layers, start, depth_map, per_position=jnp.arange(depth))[1]


def _matrices(layer) -> tuple[jax.Array, jax.Array]:
    """(P, Q) of one layer."""
    if "p" in layer:
        return layer["p"], layer["q"]
    d = layer["u"].shape[0]
    q = jnp.zeros((d + 1, d + 1)).at[:d, :d].set(layer["a"])
    p = jnp.zeros((d + 1, d + 1)).at[d, :d].set(layer["u"]).at[d, d].set(1.0)
    return p * layer.get("scale", 1.0), q


def relative_loss(
    predictions: jax.Array, prompts: Prompts, cap: float | None = None
) -> jax.Array:
    """Mean squared error over the mean square of the answers, d in expectation: 1 is to say 0.

    Args:
      predictions: `[..., batch]`.
      prompts: whose answers are `[batch]`.
      cap: what one prompt may count for at the most; beyond it, or where the prediction is not
        finite, it counts as that and has no gradient. None: no cap.
    """
    dimension = prompts.tokens.shape[-1] - 1
    error = predictions - jnp.broadcast_to(prompts.answers, predictions.shape)
    each = error**2 / dimension
    if cap is not None:
        each = jnp.where(each < cap, each, cap)
    return jnp.mean(each, axis=-1)
