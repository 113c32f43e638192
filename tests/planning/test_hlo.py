"""Programs as text: shapes, calls, and how often each instruction runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from stacking_jax.planning.hlo import Module

LOOPS = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %v = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %r = f32[4]{0:T(128)S(1)} negate(%v)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %r)
}

%inner_condition (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]{0}) parameter(0)
  %v = f32[4]{0} get-tuple-element(%q), index=1
  %one = s32[] constant(1)
  %init = (s32[], f32[4]{0}) tuple(%one, %v)
  %inner = (s32[], f32[4]{0}) while(%init), condition=%inner_condition, body=%inner_body
  %w = f32[4]{0} get-tuple-element(%inner), index=1
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] add(%j, %one)
  ROOT %s = (s32[], f32[4]{0}) tuple(%n, %w)
}

%outer_condition (q: (s32[], f32[4])) -> pred[] {
  ROOT %unread = pred[] custom-call(), custom_call_target="more"
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %a)
  %outer = (s32[], f32[4]{0}) while(%start), condition=%outer_condition, body=%outer_body, NOTE
  ROOT %out = f32[4]{0} get-tuple-element(%outer), index=1
}
"""
NOTED = LOOPS.replace("NOTE", 'backend_config={"known_trip_count":{"n":"7"}}')


def visits(module, name):
    return [visit for visit in module.visits() if visit.instruction.name == name]


def test_nested_loops_multiply():
    # The inner counter goes 1, 3, 5, 7: four times; the outer one is noted: seven.
    (negation,) = visits(Module(NOTED), "r")
    assert (negation.times, negation.exact) == (28, True)
    assert negation.scope == "inner_body"


def test_a_kernel_whose_attributes_go_over_several_lines_ends_no_loop():
    """As splash attention's do: what follows it in the loop's body was lost, and its length."""
    kernel = (
        '  %k = f32[4]{0} custom-call(%v), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 128}"\n}}, '
        'metadata={op_name="attend"}\n'
    )
    module = Module(NOTED.replace("  %r = f32[4]", kernel + "  %r = f32[4]"))
    (negation,), (called,) = visits(module, "r"), visits(module, "k")
    assert (negation.times, called.times, called.exact) == (28, 28, True)
    assert "metadata={op_name" in called.instruction.attributes


def test_a_length_that_is_not_written_down_is_said_to_be_unknown():
    (negation,) = visits(Module(LOOPS), "r")
    assert (negation.times, negation.exact) == (4, False)


def test_shapes_in_bytes_and_where_they_lie():
    (negation,) = visits(Module(NOTED), "r")
    assert (negation.instruction.bytes, negation.instruction.hbm_bytes) == (16, 0)
    (init,) = visits(Module(NOTED), "init")
    assert init.instruction.bytes == 4 + 16 == init.instruction.hbm_bytes


@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [
        ("bf16[8,96,24]{1,2,0:T(8,128)(2,1)}", 8 * 96 * 24 * 2), ("pred[]{:T(512)}", 1),
        ("f8e4m3fn[16]", 16), ("u4[16]", 8), ("(f32[2]{0}, s32[])", 12), ("f32[0,4]", 0),
    ],
)  # fmt: skip
def test_every_kind_of_number_has_its_size(shape, bytes_):
    module = Module(f"ENTRY %m (a: f32[]) -> f32[] {{\n  ROOT %a = {shape} copy(%b)\n}}\n")
    assert module.computations["m"].root.bytes == bytes_


@pytest.mark.parametrize(
    ("direction", "sides", "start", "length"),
    [
        ("LT", "%i, %limit", 0, 9), ("LE", "%i, %limit", 0, 10), ("GT", "%limit, %i", 0, 9),
        ("LT", "%i, %limit", 4, 5), ("LT", "%i, %limit", 20, 0), ("NE", "%i, %limit", 0, None),
    ],
)  # fmt: skip
def test_lengths_follow_from_the_condition(direction, sides, start, length):
    text = (
        NOTED.replace("constant(2)", "constant(1)")
        .replace("compare(%i, %limit), direction=LT", f"compare({sides}), direction={direction}")
        .replace("%init = (s32[], f32[4]{0}) tuple(%one", "%init = (s32[], f32[4]{0}) tuple(%k")
        .replace("  %one = s32[] constant(1)", f"  %one = s32[] constant(1)\n  %k = s32[] "
                 f"constant({start})")
    )
    module = Module(text)
    outer = module.computations["outer_body"]
    assert module.trip_count(outer, outer.instructions["inner"]) == length


def test_loops_of_a_real_program():
    def f(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, jnp.stack([x] * 5))[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
    module = Module(text)
    sines = [v for v in module.visits() if v.instruction.opcode == "sine"]
    assert sum(visit.times for visit in sines) == 15 and all(visit.exact for visit in sines)


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("HloModule nothing\n")
