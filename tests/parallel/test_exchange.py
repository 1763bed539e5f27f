"""Transports against `local`, for every kind of routing: values, gradients, and what they send."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from dsv3.config import Fp8Dot
from dsv3.model.moe import experts_here
from dsv3.numerics.dot import PlainDot, build
from dsv3.parallel import exchange
from dsv3.parallel.exchange import Hop, route_of, through_experts

X, K, E, D, M, BLOCK = 6, 4, 16, 8, 4, 4  # X tokens a device
PLAIN = PlainDot()
GROUPS, REACHED = 4, 2  # groups of experts, of which a token reaches so many
NODE, LOCAL = 2, 4
RANKS = NODE * LOCAL
AXES = ("node", "local")
FLAT = (Hop(AXES, RANKS, K),)
LIMITED = (Hop(("node",), NODE, REACHED), Hop(("local",), LOCAL, K))
WAYS = {"flat": FLAT, "limited": LIMITED, "one axis": (Hop(("local",), LOCAL, K),)}


def spread(rng):
    """Group-limited, as the router chooses."""
    groups = rng.permuted(np.tile(np.arange(GROUPS), (RANKS * X, 1)), axis=1)[:, :REACHED]
    within = rng.permuted(np.tile(np.arange(8), (RANKS * X, 1)), axis=1)[:, :K]
    return groups[np.arange(RANKS * X)[:, None], within // 4] * 4 + within % 4


ROUTINGS = {
    "spread": spread,
    "all to the same experts": lambda rng: np.tile([0, 1, 2, 3], (RANKS * X, 1)),
    "all to the last device": lambda rng: np.tile([14, 15, 12, 13], (RANKS * X, 1)),
    "each device to itself": lambda rng: np.repeat(
        np.stack([[2 * r, 2 * r + 1, 2 * (r ^ 1), 2 * (r ^ 1) + 1] for r in range(RANKS)]), X, 0
    ),
    "one device sends all it has to one": lambda rng: np.where(
        np.arange(RANKS * X)[:, None] < X, [8, 9, 10, 11], spread(rng)
    ),
}


def routing(name):
    return ROUTINGS[name](np.random.default_rng(0)).astype(np.int32)


def operands(seed=1):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = random(E, D, M), random(E, D, M), random(E, M, D)
    return weights, random(RANKS * X, D), random(RANKS * X, K), random(RANKS * X, D)


def mesh_of(*shape):
    if jax.device_count() < math.prod(shape):
        pytest.skip(f"wants {math.prod(shape)} devices")
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * 2)


def pulled(dot, hops, share):
    """(weights, u, experts, gates, dy) to y and the gradients of weights, u and gates."""

    def run(weights, u_XD, experts_XK, gates_XK, dy_XD):
        work = functools.partial(experts_here, dot, BLOCK)

        def forward(weights, u_XD, gates_XK):
            return through_experts(hops, share, dot, work, weights, u_XD, experts_XK, gates_XK)

        y_XD, pull = jax.vjp(forward, weights, u_XD, gates_XK)
        return y_XD, pull(dy_XD)

    return run


@functools.cache
def alone(dot=PLAIN):
    return jax.jit(pulled(dot, (), None))


@functools.cache
def over_mesh(way, share=None, dot=PLAIN):
    mesh = mesh_of(1, RANKS // 2) if way == "one axis" else mesh_of(NODE, LOCAL)
    by_rank = jax.P(AXES)
    return jax.jit(
        jax.shard_map(
            pulled(dot, WAYS[way], share), mesh=mesh, in_specs=by_rank, out_specs=by_rank,
            check_vma=False,
        )
    )  # fmt: skip


def compared(way, share, name, dot=PLAIN, **tolerance):
    weights, u_XD, gates_XK, dy_XD = operands()
    given = weights, u_XD, routing(name), gates_XK, dy_XD
    chex.assert_trees_all_close(over_mesh(way, share, dot)(*given), alone(dot)(*given), **tolerance)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("share", [None, 1.0])
@pytest.mark.parametrize("way", ["flat", "limited"])
def test_values_and_gradients_are_those_of_one_device(way, share, name):
    # FP32 sums of up to 200 products in another order.
    compared(way, share, name, rtol=1e-5, atol=1e-4)


def test_a_mesh_of_one_axis_will_do():
    compared("one axis", None, "spread", rtol=1e-5, atol=1e-4)


def test_what_travels_in_fp8_is_what_one_device_rounds():
    dot = build(Fp8Dot(scales="power_of_two"))
    y_XD, (dws, du_XD, dg_XK) = over_mesh("limited", None, dot)(*fp8_given())
    y, (dws_alone, du, dg) = alone(dot)(*fp8_given())
    # The same FP8 numbers are multiplied; only the order of four FP32 terms differs.
    chex.assert_trees_all_close((y_XD, du_XD, dg_XK), (y, du, dg), rtol=1e-5, atol=1e-4)
    # Wgrad's groups are blocks of an expert's rows, which arrive in another order.
    chex.assert_trees_all_close(dws, dws_alone, rtol=0.1, atol=0.3)


def fp8_given():
    weights, u_XD, gates_XK, dy_XD = operands()
    return weights, u_XD, routing("spread"), gates_XK, dy_XD


# --- passes ------------------------------------------------------------------------------------


def passes(experts_XK, rows):
    def run(experts_XK):
        pass_XK, number = exchange.passes_of(experts_XK, E // RANKS, LIMITED, rows)
        return pass_XK, number[None]

    by_rank = jax.P(AXES)
    mesh = mesh_of(NODE, LOCAL)
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=by_rank, out_specs=by_rank, check_vma=False)
    )(experts_XK)


@pytest.mark.parametrize("name", ROUTINGS)
def test_no_device_takes_more_rows_in_a_pass_than_agreed(name):
    experts_XK, rows = routing(name), X * K
    pass_XK, numbers = passes(experts_XK, rows)
    device_XK = experts_XK // (E // RANKS)
    taken = np.zeros((int(numbers.max()), RANKS), int)
    np.add.at(taken, (np.asarray(pass_XK), device_XK), 1)  # an index error if there are too few
    assert len(set(np.asarray(numbers).tolist())) == 1 and taken.sum() == experts_XK.size
    assert np.all(taken <= rows) and taken[-1].any()
    assert np.all((taken[:-1] == rows) | (taken[1:] == 0))  # no pass before the one before is full
    assert (len(taken) > 1) == (np.bincount(device_XK.ravel()).max() > rows)


# --- what crosses between nodes ----------------------------------------------------------------


def sent(hop, experts_XK):
    """Copies from each rank of the hop to each, [ranks, ranks], counted in the rows to be sent."""

    def rows(experts_XK):
        route = route_of(experts_XK, E, hop, 1)
        starts_n = jnp.cumsum(route.sizes_nn[lax.axis_index(hop.axes)])
        rank_P = jnp.searchsorted(starts_n, jnp.arange(len(route.token_P)), side="right")
        return jnp.sum(jax.nn.one_hot(rank_P, hop.ranks) * (route.token_P < X)[:, None], 0)[None]

    by_rank = jax.P(AXES)
    run = jax.shard_map(
        rows, mesh=mesh_of(NODE, LOCAL), in_specs=by_rank, out_specs=by_rank, check_vma=False
    )
    return np.asarray(jax.jit(run)(experts_XK)).reshape(NODE, LOCAL, hop.ranks)


@pytest.mark.parametrize("name", ["spread", "all to the same experts"])
def test_a_token_crosses_once_to_each_node_that_it_is_sent_to(name):
    experts_XK = routing(name)
    nodes_X = np.array([len({e // (E // NODE) for e in row}) for row in experts_XK])
    own_X = np.arange(RANKS * X) // (LOCAL * X)
    stays_X = np.any(experts_XK // (E // NODE) == own_X[:, None], axis=1)
    limited, flat = sent(LIMITED[0], experts_XK), sent(FLAT[0], experts_XK)
    away = ~np.eye(NODE, dtype=bool)
    crossing = sum(limited[n, :, m].sum() for n, m in zip(*np.nonzero(away), strict=True))
    assert limited.sum() == nodes_X.sum() <= REACHED * RANKS * X
    assert crossing == nodes_X.sum() - stays_X.sum()
    by_node = flat.reshape(NODE, LOCAL, NODE, LOCAL)
    assert crossing < sum(by_node[n, :, m].sum() for n, m in zip(*np.nonzero(away), strict=True))


# --- the exchange itself -----------------------------------------------------------------------


def by_the_book(operand, output, starts, sizes, places, received, *, axis_name):
    """`lax.ragged_all_to_all` as its documentation defines it, slice by slice."""
    ranks = sizes.shape[0]
    rows_n, starts_n = lax.all_gather((operand, starts), axis_name)
    sizes_n, places_n = lax.all_gather((sizes, places), axis_name)
    me = lax.axis_index(axis_name)
    for source in range(ranks):
        slot = jnp.arange(output.shape[0])
        inside = (slot >= places_n[source, me]) & (slot < places_n[source, me] + received[source])
        index = starts_n[source, me] + slot - places_n[source, me]
        value = rows_n[source][jnp.clip(index, 0, operand.shape[0] - 1)]
        inside &= received[source] == sizes_n[source, me]
        output = jnp.where(inside.reshape(-1, *(1,) * (output.ndim - 1)), value, output)
    return output


@pytest.mark.parametrize("name", ROUTINGS)
def test_both_exchanges_bring_the_same_rows_there_and_back(name, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", by_the_book)

    def run(x_XD, experts_XK):
        route = route_of(experts_XK, E, FLAT[0], RANKS * X)
        rows = exchange.rows_of(x_XD, route.token_P)
        n, axes = route.sizes_nn, AXES
        there = (
            exchange.padded_exchange(rows, n, axes, X, RANKS * X),
            exchange.ragged_exchange(rows, n, axes, RANKS * X),
        )
        back = (
            exchange.padded_exchange(there[0], n.T, axes, X, len(rows)),
            exchange.ragged_exchange(there[0], n.T, axes, len(rows)),
        )
        return there, back, rows

    by_rank = jax.P(AXES)
    mesh = mesh_of(NODE, LOCAL)
    run = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=by_rank, out_specs=by_rank, check_vma=False)
    )
    there, back, rows = run(operands()[1], routing(name))
    np.testing.assert_array_equal(*there)
    np.testing.assert_array_equal(*back)
    np.testing.assert_array_equal(back[0], rows)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_exchange_exactly_the_rows_there_are(platform):
    run = over_mesh("limited")
    weights, u_XD, gates_XK, dy_XD = operands()
    traced = run.trace(weights, u_XD, routing("spread"), gates_XK, dy_XD)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Two hops, each with tokens, gates and experts there and sums back; then the transposes.
    assert text.count("ragged_all_to_all(") == 2 * (3 + 1 + 3)
    assert "all_to_all" not in text.replace("ragged_all_to_all", "")
