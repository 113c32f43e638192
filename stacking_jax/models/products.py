"""The products of a layer, and the gate between them: what computes them, what they keep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.models.placement import Placement


def dense(x: jax.Array, kernel: jax.Array, constrain: Any) -> jax.Array:
    """x · kernel over the last axis.

    On a CPU the other axes are made one before. The gradient of the kernel sums over them, and
    over two axes XLA's CPU backend sums only what it has copied into another order first: such
    copies took an eighth of a train step.

    Args:
      x: `[B, L, in]`.
      kernel: `[in, out]`.
      constrain: where `x` lies. A length that is divided over devices is left alone: one axis
        could not be.

    Returns:
      `[B, L, out]`.
    """
    if not _sums_one_axis(constrain):
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _sums_one_axis(constrain: Any) -> bool:
    if not isinstance(constrain, Placement):
        return False
    return constrain.device.platform == "cpu" and constrain.parts("length") == 1


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, elementwise in float32, for SwiGLU (Shazeer 2020).

    The backward pass takes its two arguments and nothing else; by JAX's own rules it would keep
    the sigmoid and the silu too, as large as they are.
    """
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * up).astype(gate.dtype)


def _gated_forward(gate, up):
    return gated(gate, up), (gate, up)


def _gated_backward(kept, gradient):
    gate, up = (x.astype(jnp.float32) for x in kept)
    gradient = gradient.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = gradient * gate * sigmoid
    return of_gate.astype(kept[0].dtype), of_up.astype(kept[1].dtype)


gated.defvjp(_gated_forward, _gated_backward)
