"""Reading one layer of a stack at a traced index, without keeping what was read.

Differentiating `layers[index]` at every position would add an array of *all*
layers at every position; gathering the layers up front keeps a second copy of
the weights alive until the backward pass. `read_layer` takes both the stack
and the gathered layer, which are equal: it computes with the one and sends the
gradient to the other. The compiler drops a gather that nobody reads, while its
gradient stays one scatter-add. It is a primitive of its own, since a
`jax.custom_jvp` rule is dropped in second derivatives and no checkpoint policy
could name it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_read_p = Primitive("read_layer")


def read_layer(stack: jax.Array, index: jax.Array, gathered: jax.Array) -> jax.Array:
    """`stack[index]`, differentiated as `gathered`.

    Args:
      stack: `[stored, ...]`; its own derivative is not taken.
      index: an integer scalar within bounds.
      gathered: `[...]`, equal to `stack[index]`; its value is not read.
    """
    return _read_p.bind(stack, index, gathered, batch_axes=0)


def keep_all_but_layers(policy, primitive, *args, **params) -> bool:
    """`policy` (None: keep everything), except that layers are read again."""
    if primitive is _read_p:
        return False
    return True if policy is None else policy(primitive, *args, **params)


def _read(stack, index, gathered, *, batch_axes):
    del gathered
    read = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
    for _ in range(batch_axes):
        read = jax.vmap(read)
    return read(stack, index)


def _batch(args, axes, *, batch_axes):
    pairs = list(zip(args, axes, strict=True))
    size = next(arg.shape[axis] for arg, axis in pairs if axis is not None)
    args = [
        jax.lax.broadcast(arg, (size,)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in pairs
    ]
    return _read_p.bind(*args, batch_axes=batch_axes + 1), 0


_read_p.def_impl(jax.jit(_read, static_argnames="batch_axes"))
_read_p.def_abstract_eval(lambda stack, index, gathered, *, batch_axes: gathered)
ad.primitive_jvps[_read_p] = lambda primals, tangents, *, batch_axes: (
    _read_p.bind(*primals, batch_axes=batch_axes),
    tangents[2],
)
batching.primitive_batchers[_read_p] = _batch
mlir.register_lowering(_read_p, mlir.lower_fun(_read, multiple_results=False))
