"""Bytes of main memory: slices count for themselves, fast memory not at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stacking_jax.planning.hlo import Module
from stacking_jax.planning.traffic import hbm_bytes

TEXT = """
%sliced (stack: f32[10,100], i: s32[]) -> f32[100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%slice)
}

%updated (stack: f32[10,100], row: f32[1,100], i: s32[]) -> f32[10,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[10,100]{1,0} dynamic-update-slice(%stack, %row, %i, %zero)
}

ENTRY %m (stack: f32[10,100]) -> f32[10,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %i = s32[]{:S(6)} constant(3)
  %row = f32[100]{0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %near = f32[100]{0:S(1)} negate(%row)
  %far = f32[100]{0} negate(%near)
  %flat = f32[1,100]{1,0} bitcast(%far)
  ROOT %out = f32[10,100]{1,0} fusion(%stack, %flat, %i), kind=kLoop, calls=%updated
}
"""


def test_what_each_instruction_moves():
    # Slice: 400 read, 400 written. To fast memory: 400 read; back: 400 written.
    # Update: the row is read and written; the rest of the stack stays where it is.
    assert hbm_bytes(Module(TEXT)) == 800 + 400 + 400 + 800


def test_a_scan_reads_its_stack_once():
    """On CPU: a real loop of 50 slices moves about the stack, and not 50 of them."""

    def f(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x * w), None), x, stack)[0]

    stack, x = jnp.ones((50, 4096)), jnp.ones(4096)
    moved = hbm_bytes(Module(jax.jit(f).lower(stack, x).compile().as_text()))
    assert stack.nbytes < moved < 6 * stack.nbytes
