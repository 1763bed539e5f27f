"""Collectives of a compiled program: a real one, and lines in XLA's other spellings."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

from dsv3.reporting.hlo import (
    Collective,
    Shape,
    Transfer,
    collectives,
    host_work,
    transfers,
)

SIZES = {"pipe": 1, "replica": 2, "node": 2, "local": 2}
ROWS, WIDTH = 16, 8


def body(x, count):
    """On one device x is float32 [16, 8], 512 bytes."""

    def inner(x, _):
        return x + lax.all_gather(x, "local", tiled=True)[:ROWS], None

    def outer(x, _):
        x = lax.scan(inner, x, length=5)[0]
        return x * lax.psum(x.sum(), ("replica", "node")), None

    x = lax.scan(outer, x, length=3)[0]
    x = x + lax.all_to_all(x.reshape(2, -1, WIDTH), "node", 0, 0, tiled=True).reshape(ROWS, WIDTH)
    x = jnp.tile(lax.psum_scatter(x, ("node", "local"), tiled=True), (4, 1))
    x = lax.ppermute(x, "replica", [(0, 1), (1, 0)])
    return lax.fori_loop(0, count, lambda _, x: lax.pmax(x, "local"), x)


@functools.cache
def program():
    if jax.device_count() < 8:
        pytest.skip("wants 8 devices")
    axes = (AxisType.Auto,) * 4
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=axes,
                         devices=jax.devices()[:8])  # fmt: skip
    step = jax.shard_map(body, mesh=mesh, in_specs=(jax.P(tuple(SIZES)), jax.P()),
                         out_specs=jax.P(tuple(SIZES)), check_vma=False)  # fmt: skip
    shapes = (
        jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((), "int32"),
    )
    return jax.jit(step).lower(*shapes).compile().as_text()


EXPECTED = {  # kind, axes: group, times, bytes of the whole, bytes that a device sends at least
    ("all-gather", ("local",)): (2, 15, 1024, 512),
    ("all-reduce", ("replica", "node")): (4, 3, 4, 6),
    ("all-to-all", ("node",)): (2, 1, 512, 256),
    ("reduce-scatter", ("node", "local")): (4, 1, 512, 384),
    ("collective-permute", ("replica",)): (2, 1, 512, 512),
    ("all-reduce", ("local",)): (2, 1, 512, 512),
}


def test_a_program_s_collectives_are_all_found():
    found = collectives(program(), SIZES)
    seen = {(one.kind, one.axes): (one.group, one.times, one.whole, one.sent) for one in found}
    assert seen == EXPECTED
    assert len(found) == len(EXPECTED)
    assert {one.dtype for one in found} == {"f32"}


def test_only_what_depends_on_data_is_dynamic():
    dynamic = [one for one in collectives(program(), SIZES) if one.dynamic]
    assert [(one.kind, one.axes) for one in dynamic] == [("all-reduce", ("local",))]


def test_an_exchange_has_rows():
    [exchange] = [one for one in collectives(program(), SIZES) if one.kind == "all-to-all"]
    assert exchange.rows == ROWS


def module(line: str) -> str:
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  %x = {line}\n}}\n"


WRITTEN = [  # an instruction, and what it says on the mesh (1, 2, 2, 2)
    ("f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
     Collective("all-reduce", ("local",), 2, (Shape("f32", (4,)),), 1, False)),
    ("bf16[4,2]{1,0} all-gather(%p), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}",
     Collective("all-gather", ("node",), 2, (Shape("bf16", (4, 2)),), 1, False)),
    ("s8[4]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}",
     Collective("all-gather", ("replica", "node", "local"), 8, (Shape("s8", (4,)),), 1, False)),
    ("(f32[2]{0}, pred[]) all-reduce(%p, %q), replica_groups={}, to_apply=%add",
     Collective("all-reduce", ("replica", "node", "local"), 8,
                (Shape("f32", (2,)), Shape("pred", ())), 1, False)),
    ("(bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%p), "
     "replica_groups=mesh['pipe'=1,'replica'=2,'node'=2,'local'=2] {'pipe','node','local'}",
     Collective("all-gather", ("node", "local"), 4, (Shape("bf16", (8, 4)),), 1, False)),
    ("((f8e4m3fn[24,4]{1,0}, f8e4m3fn[32,4]{1,0:S(7)}, s64[2]{0}, /*index=3*/s64[2]{0}), "
     "f8e4m3fn[32,4]{1,0:S(7)}) ragged-all-to-all-start(%p), "
     "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
     Collective("ragged-all-to-all", ("replica",), 2, (Shape("f8e4m3fn", (32, 4)),), 1, False)),
    ("((f32[8]{0}, f32[4,2]{1,0}), (f32[4]{0}, f32[2,2]{1,0})) reduce-scatter-start(%p, %q), "
     "replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}",
     Collective("reduce-scatter", ("local",), 2,
                (Shape("f32", (4,)), Shape("f32", (2, 2))), 1, False)),
    ("((s32[2,8]{1,0}), s32[2,8]{1,0}) all-reduce-start(%p), replica_groups={{0,1},{2,3}}",
     Collective("all-reduce", ("local",), 2, (Shape("s32", (2, 8)),), 1, False)),
    ("(f32[2]{0}, f32[3]{0}) all-reduce-start(%p, %q), replica_groups={{0,1},{2,3}}",
     Collective("all-reduce", ("local",), 2, (Shape("f32", (2,)), Shape("f32", (3,))), 1, False)),
    ("f32[4]{0} collective-permute(%p), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}",
     Collective("collective-permute", ("node",), 2, (Shape("f32", (4,)),), 1, False)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), WRITTEN, ids=[e.kind for _, e in WRITTEN])
def test_every_spelling_is_read(line, expected):
    assert collectives(module(line), SIZES) == [expected]


def test_a_group_of_one_sends_nothing():
    alone = "f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert collectives(module(alone), SIZES) == []


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("s64", 8), ("u32", 4)]
)
def test_dtypes_have_sizes(dtype, size):
    assert Shape(dtype, (3, 5)).bytes == 15 * size


def test_rows_that_arrive_are_those_of_the_buffer():
    ragged = Collective("ragged-all-to-all", ("node",), 2, (Shape("bf16", (32, 4)),), 1, False)
    assert ragged.rows == 32 and ragged.whole == 256 and ragged.sent == 128


# --- schedules ---------------------------------------------------------------------------------

SCHEDULE = """HloModule m, is_scheduled=true

%fused (a: f32[4,16], b: f32[16,8]) -> f32[4,8] {
  %a = f32[4,16]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %inner = f32[4,8]{1,0} fusion(%s), kind=kCustom, calls=%fused
}

ENTRY %main (x: f32[4,16], w: f32[16,8], h: f32[4,8]) -> f32[4,8] {
  %x = f32[4,16]{1,0} parameter(0)
  %w = f32[16,8]{1,0} parameter(1)
  %h = f32[4,8]{1,0:S(5)} parameter(2)
  %gather-start = (f32[4,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  %down = (f32[16,8]{1,0:S(5)}, f32[16,8]{1,0}, u32[]) copy-start(%w)
  %y = f32[4,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
  %down-done = f32[16,8]{1,0:S(5)} copy-done(%down)
  %loop = (s32[], f32[4,8]{1,0}) while(%y), body=%body, c={"known_trip_count":{"n":"3"}}
  %gather = f32[8,16]{1,0} all-gather-done(%gather-start)
  %other-start = (f32[4,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  %other = f32[8,16]{1,0} all-gather-done(%other-start)
  %moved = f32[4,16]{1,0} copy(%x)
  %host-start = ((f32[4,8]{1,0:S(5)}), f32[4,8]{1,0:S(5)}, u32[]) custom-call-start(%h), HOST
  %early = f32[4,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
  %host-done = f32[4,8]{1,0:S(5)} custom-call-done(%host-start)
  %up = f32[4,8]{1,0} copy(%h)
  ROOT %late = f32[4,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused
}
""".replace("HOST", 'async_execution_thread="host", custom_call_target="HostExecute"')


def test_products_that_run_while_something_travels_are_counted():
    one = 2.0 * 4 * 8 * 16
    early, late = collectives(SCHEDULE, {"local": 2})
    assert (early.meanwhile, late.meanwhile) == (one + 3 * one, 0.0)


def test_copies_between_device_and_host_are_found():
    down, up = transfers(SCHEDULE)
    assert down == Transfer(to_host=True, bytes=4 * 16 * 8, times=1, meanwhile=2.0 * 4 * 8 * 16)
    assert up == Transfer(to_host=False, bytes=4 * 4 * 8, times=1, meanwhile=0.0)


def test_the_host_computes_while_products_run():
    assert host_work(SCHEDULE) == [2.0 * 4 * 8 * 16]
