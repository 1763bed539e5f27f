"""Dispatch and combine: the layout's invariants, their duality, and that no token is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.numerics.rule import PlainWire
from dsv3.parallel import dispatch as module
from dsv3.parallel.dispatch import count, dispatch_gates, layout_of

X, K, E, D = 13, 3, 6, 5
BLOCKS = (1, 4, 64)

layout_at = jax.jit(layout_of, static_argnums=(1, 2))
count_at = jax.jit(count, static_argnums=1)
dispatch = functools.partial(module.dispatch, PlainWire())
combine = functools.partial(module.combine, PlainWire())
dispatch_at, combine_at, dispatch_gates_at = map(jax.jit, (dispatch, combine, dispatch_gates))

choices = st.permutations(range(E)).map(lambda order: order[:K])
routings = st.one_of(
    st.lists(choices, min_size=X, max_size=X),
    choices.map(lambda choice: [choice] * X),  # everything to the same K experts
).map(lambda rows: np.array(rows, np.int32))


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_routing(seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(E)[:K] for _ in range(X)]).astype(np.int32)


@pytest.mark.parametrize("block", BLOCKS)
@given(experts_XK=routings)
def test_every_assignment_has_one_row_in_a_block_of_its_expert(experts_XK, block):
    layout = jax.tree.map(np.asarray, layout_at(experts_XK, E, block))
    rows = layout.assignment_P.shape[0]
    assert rows == min(-(-X * K // block) + E, X * K) * block  # one static size for every routing
    used = np.flatnonzero(layout.assignment_P < X * K)
    np.testing.assert_array_equal(np.sort(layout.assignment_P[used]), np.arange(X * K))
    assert np.all(layout.assignment_P[layout.assignment_P >= X * K] == X * K)
    np.testing.assert_array_equal(
        layout.assignment_P[layout.row_XK], np.arange(X * K).reshape(X, K)
    )
    np.testing.assert_array_equal(layout.expert_Z[layout.row_XK // block], experts_XK)
    assert np.all(np.diff(layout.expert_Z) >= 0)
    blocks_used = sum(-(-n // block) for n in np.bincount(experts_XK.ravel()))
    assert np.all((layout.expert_Z == E) == (np.arange(rows // block) >= blocks_used))
    for expert in range(E):  # stable: an expert meets its tokens in their order
        mine = used[layout.expert_Z[used // block] == expert]
        assert np.all(np.diff(layout.assignment_P[mine]) > 0)


@given(experts_XK=routings)
def test_no_token_is_dropped(experts_XK):
    layout = layout_at(experts_XK, E, 4)
    x_XD = random(0, X, D)
    np.testing.assert_allclose(combine_at(dispatch_at(x_XD, layout), layout), K * x_XD, rtol=1e-6)


@given(experts_XK=routings)
def test_dispatch_and_combine_are_transposes(experts_XK):
    layout = layout_at(experts_XK, E, 4)
    x_XD, y_PD = random(0, X, D), random(1, layout.assignment_P.shape[0], D)
    there = np.vdot(dispatch_at(x_XD, layout), y_PD)
    back = np.vdot(x_XD, combine_at(y_PD, layout))
    np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-4)  # FP32 sums of 195 products


def plain_dispatch(x_XD, layout):
    padded = jnp.concatenate([jnp.repeat(x_XD, K, axis=0), jnp.zeros((1, x_XD.shape[1]))])
    return padded[layout.assignment_P]


def plain_combine(y_PD, layout):
    return sum(y_PD[layout.row_XK[:, k]] for k in range(K))


def plain_gates(gates_XK, layout):
    return jnp.concatenate([gates_XK.reshape(-1), jnp.zeros(1)])[layout.assignment_P]


ROWS = (-(-X * K // 4) + E) * 4


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [
        (dispatch, plain_dispatch, (X, D)),
        (combine, plain_combine, (ROWS, D)),
        (dispatch_gates, plain_gates, (X, K)),
    ],
    ids=["dispatch", "combine", "dispatch_gates"],
)
def test_values_and_gradients_are_those_of_plain_gathers(ours, plain, shape):
    layout, x = layout_at(some_routing(), E, 4), random(0, *shape)

    def both(function):
        y, pullback = jax.vjp(lambda x: function(x, layout), x)
        return y, *pullback(jnp.asarray(random(1, *y.shape)))

    for mine, wanted in zip(jax.jit(both, static_argnums=0)(ours), both(plain), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-6)


def test_padding_rows_are_zero_whatever_the_tokens_hold():
    layout = layout_at(some_routing(), E, 4)
    padding = np.asarray(layout.assignment_P) == X * K
    x_PD = np.asarray(dispatch_at(np.full((X, D), np.inf, np.float32), layout))
    gates_P = np.asarray(dispatch_gates_at(np.full((X, K), np.inf, np.float32), layout))
    assert padding.any() and not x_PD[padding].any() and not gates_P[padding].any()


def test_permuting_tokens_permutes_the_result():
    experts_XK, x_XD = some_routing(), random(0, X, D)
    order = np.random.default_rng(1).permutation(X)

    def through(experts_XK, x_XD):  # each row is scaled by its expert, so a mix-up shows
        layout = layout_at(experts_XK, E, 4)
        expert_P1 = jnp.repeat(layout.expert_Z, 4)[:, None]
        return np.asarray(combine_at(dispatch_at(x_XD, layout) * (1 + expert_P1), layout))

    permuted = through(experts_XK[order], x_XD[order])
    np.testing.assert_allclose(permuted, through(experts_XK, x_XD)[order], rtol=1e-6)
    np.testing.assert_allclose(permuted, x_XD[order] * (K + experts_XK[order].sum(1))[:, None],
                               rtol=1e-5)  # fmt: skip


@given(experts_XK=routings, valid_X=st.lists(st.booleans(), min_size=X, max_size=X))
def test_counts_are_a_histogram_of_the_valid_tokens(experts_XK, valid_X):
    valid_X = np.array(valid_X)
    counted = count_at(experts_XK, E, valid_X)
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, np.bincount(experts_XK[valid_X].ravel(), minlength=E))
    everyone = np.bincount(experts_XK.ravel(), minlength=E)
    np.testing.assert_array_equal(count_at(experts_XK, E), everyone)
    assert everyone.sum() == X * K
