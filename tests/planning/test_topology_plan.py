"""Which programs a plan asks for."""

from __future__ import annotations

import dataclasses

from stacking_jax.planning.topology_plan import full_depth, questions


def test_full_depth_is_the_last_stage_where_nothing_tells_them_apart(tiny):
    assert questions(tiny) == [(tiny, 0), (tiny, 1)]
    constant = full_depth(tiny)
    assert questions(constant) == [(constant, 0)]


def test_gates_make_the_last_stage_another_program(tiny):
    gated = dataclasses.replace(tiny, growth=dataclasses.replace(tiny.growth, ramp_steps=3))
    assert questions(gated) == [(gated, 0), (gated, 1), (full_depth(gated), 0)]


def test_full_depth_does_not_grow(tiny):
    (stage,) = full_depth(tiny).plan().stages
    assert (stage.depth, stage.steps) == (4, 30)
