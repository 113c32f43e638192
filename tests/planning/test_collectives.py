"""Bytes between devices: small texts, and programs compiled here on eight devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stacking_jax.planning.collectives import bytes_by_kind, collectives, group_of
from stacking_jax.planning.hlo import Module


def read(body: str, devices: int = 8, more: str = ""):
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    return collectives(Module(f"{more}\nENTRY %m (a: f32[]) -> f32[] {{\n{lines}\n}}\n"), devices)


def test_each_kind_counts_its_payload():
    rows, exact = read("""
      %a = bf16[10]{0} parameter(0)
      %g = bf16[40]{0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
      %r = f32[6]{0} parameter(1)
      %s = (f32[6]{0}, bf16[10]{0}) all-reduce(%r, %a), replica_groups={}, to_apply=%add
      %t = f32[3]{0} reduce-scatter(%r), replica_groups=[4,2]<=[8], dimensions={0}
      %u = f32[6]{0} all-to-all(%r), replica_groups=[2,4]<=[4,2]T(1,0)
      ROOT %v = f32[6]{0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
    """)
    assert exact
    assert bytes_by_kind(rows) == {
        "all-gather": 80, "all-reduce": 24 + 20, "reduce-scatter": 24, "all-to-all": 24,
        "collective-permute": 24,
    }
    sent = {row.kind: row.sent_bytes for row in rows}
    assert sent == {
        "all-gather": 60, "all-reduce": 2 * 7 / 8 * 44, "reduce-scatter": 12, "all-to-all": 18,
        "collective-permute": 24,
    }
    assert {row.kind: row.group_size for row in rows}["all-to-all"] == 4


def test_an_asynchronous_pair_counts_once():
    rows, _ = read("""
      %a = f32[2]{0} parameter(0)
      %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}
      %d = f32[16]{0} all-gather-done(%s)
      %p = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%d), source_target_pairs={{0,1}}
      ROOT %q = f32[16]{0} collective-permute-done(%p)
    """)  # noqa: E501
    assert bytes_by_kind(rows) == {"all-gather": 64, "collective-permute": 64}


def test_a_wrapped_asynchronous_pair_counts_once():
    inner = """%wrapped (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""
    rows, _ = read("""
      %a = f32[8]{0} parameter(0)
      %s = ((f32[8]{0}), f32[8]{0}) async-start(%a), calls=%wrapped
      %u = ((f32[8]{0}), f32[8]{0}) async-update(%s), calls=%wrapped
      ROOT %d = f32[8]{0} async-done(%u), calls=%wrapped
    """, more=inner)
    assert bytes_by_kind(rows) == {"all-reduce": 32}


def test_pieces_that_tpus_weave_into_products_count_once():
    """One gather as it lies in three fusions of a TPU's program, and another one beside it."""
    piece = """%fused.{n} (p: bf16[2,48,24]) -> bf16[2,48,96] {{
  %p = bf16[2,48,24]{{1,2,0:T(8,128)(2,1)S(1)}} parameter(0)
  ROOT %g.{n} = bf16[2,48,96]{{1,2,0}} all-gather(%p), channel_id=4, replica_groups=mesh['axis_0'=1,'axis_1'=1,'axis_2'=4] {{'axis_2'}}, dimensions={{2}}, frontend_attributes={{chain_id="{chain}"}}
}}
"""  # noqa: E501
    more = "".join(piece.format(n=n, chain=chain) for n, chain in enumerate([0, 0, 0, 1]))
    rows, _ = read("""
      %a = bf16[2,48,24]{2,1,0} parameter(0)
      %f0 = bf16[2,48,96]{2,1,0} fusion(%a), kind=kCustom, calls=%fused.0
      %f1 = bf16[2,48,96]{2,1,0} fusion(%a), kind=kOutput, calls=%fused.1
      %f2 = bf16[2,48,96]{2,1,0} fusion(%a), kind=kCustom, calls=%fused.2
      ROOT %f3 = bf16[2,48,96]{2,1,0} fusion(%a), kind=kCustom, calls=%fused.3
    """, devices=4, more=more)
    assert [(row.kind, row.calls, row.bytes) for row in rows] == [
        ("all-gather", 2, 2 * 2 * 48 * 96 * 2)
    ]


@pytest.mark.parametrize(
    ("slices", "group"), [("1,2", (0, 4)), ("1:4", (0, 2, 4, 6)), ("1,2,3,4", (0, 2, 4, 6))]
)
def test_between_slices_the_hosts_carry_it(slices, group):
    """As libtpu writes a sum over slices: a send to the host and a receive, counted once."""
    asked = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.103_0",_xla_megascale_reduce_operation="SUM",'
        f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    rows, _ = read(f"""
      %a = f32[21,8,128]{{2,1,0}} parameter(0)
      %t = token[] after-all()
      %s = (f32[21,8,128]{{2,1,0}}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, {asked}
      %r = (f32[21,8,128]{{2,1,0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, {asked}
      %d = token[] send-done(%s), channel_id=2
      %e = token[] send(%a, %t), channel_id=9, is_host_transfer=true
      ROOT %v = (f32[21,8,128]{{2,1,0}}, token[]) recv-done(%r), channel_id=1
    """)  # noqa: E501
    (row,) = rows
    assert (row.kind, row.group, row.group_size) == ("all-reduce", group, len(group))
    assert row.bytes == 21 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)),
        ("replica_groups=mesh['x'=8] {'x':(4)2}", (0, 1)),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([8]<=[4,2]T(1,0)) {'y'}", (0, 2, 4, 6)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_who_is_in_a_group(text, group):
    assert group_of(f", channel_id=1, {text}, dimensions={{0}}", 8) == (group, len(group))


def test_nobody_sends_to_itself():
    rows, _ = read("""
      %a = f32[2]{0} parameter(0)
      ROOT %g = f32[2]{0} all-gather(%a), replica_groups={{0},{1}}, dimensions={0}
    """, devices=2)
    assert rows == []


def test_a_program_compiled_here_has_the_bytes_that_it_was_written_with():
    """Nested scans: a sum of 512 bytes 15 times, a gather of 2 KiB three times, a permutation."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    def f(x):  # [64] on each device.
        def inner(x, _):
            return jnp.sin(jnp.tile(x, 2) + jax.lax.psum(jnp.tile(x, 2), "d"))[:64], None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=5)
            whole = jax.lax.all_gather(x, "d", tiled=True)  # [512]
            return jnp.cos(whole.reshape(8, 64).max(axis=0) + x), None

        x, _ = jax.lax.scan(outer, x, length=3)
        return jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)])

    text = jax.jit(f).lower(jnp.ones(512)).compile().as_text()
    rows, exact = collectives(Module(text), 8)
    assert exact
    assert bytes_by_kind(rows) == {
        "all-gather": 3 * 512 * 4, "all-reduce": 15 * 128 * 4, "collective-permute": 64 * 4
    }
    assert {row.kind: row.calls for row in rows} == {
        "all-gather": 3, "all-reduce": 15, "collective-permute": 1
    }
    assert all(row.group_size == 8 for row in rows if row.kind != "collective-permute")


def test_sharded_weights_are_gathered_once_per_layer():
    """A stack sharded over `x`, its batch over `y`: what the compiler puts in, by axis."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *names: NamedSharding(mesh, P(*names))  # noqa: E731

    def f(weights, x):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, place(None, None))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights)[0]

    program = jax.jit(f, out_shardings=place("y", None)).lower(
        jax.ShapeDtypeStruct((6, 64, 64), np.float32, sharding=place(None, "x", None)),
        jax.ShapeDtypeStruct((8, 64), np.float32, sharding=place("y", None)),
    )
    rows, exact = collectives(Module(program.compile().as_text()), 8)
    gathers = [row for row in rows if row.kind == "all-gather"]
    assert exact and sum(row.bytes for row in gathers) == 6 * 64 * 64 * 4
    assert {row.group for row in gathers} == {(0, 2, 4, 6)}
