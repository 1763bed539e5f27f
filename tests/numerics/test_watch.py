"""Watched rules: the same products, and reports that NumPy counts the same from the operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Fp8Dot
from dsv3.numerics.fp8 import BLOCK, COLUMN, TILE, dequantize, quantize
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.operand import Swiglu, value
from dsv3.numerics.watch import OPERANDS, REPORT, TALLIES, Watched
from dsv3.parallel.dispatch import combine, dispatch, layout_of

RULE = Fp8Rule(Fp8Dot())
EXPERTS, ROWS = 3, 16
EXPERT_Z = jnp.array([0, 2, 2, EXPERTS], jnp.int32)
GROUPS = (TILE, BLOCK, TILE, COLUMN, COLUMN)


def spread(seed, *shape):
    """Normal numbers over seven decades, with some exact zeros: much is lost in one group."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-7, 0, size=shape)
    return jnp.asarray(np.where(rng.uniform(size=shape) < 0.1, 0, x), jnp.float32)


def counted(x, group, stored=None, powers=False):
    """The tallies of a matrix, group by group; `stored` is what is quantised, where not x."""
    x, q = (
        np.asarray(x, np.float64),
        quantize(x if stored is None else stored, group, "e4m3", powers),
    )
    values, scales = np.asarray(q.values, np.float64), np.asarray(q.scales, np.float64)
    saturated, exponents = 0, []
    for (i, j), scale in np.ndenumerate(scales):
        at = np.s_[i * group[0] : (i + 1) * group[0], j * group[1] : (j + 1) * group[1]]
        saturated += max((np.abs(values[at]) == 448).sum() - 1, 0)
        if x[at].any():
            exponents.append(np.log2(scale))
    unit = np.abs(x).max() or 1
    return {
        "nonzero": (x != 0).sum(),
        "underflow": ((x != 0) & (values == 0)).sum(),
        "saturated": saturated,
        "error": (((np.asarray(dequantize(q), np.float64) - x) / unit) ** 2).sum(),
        "power": ((x / unit) ** 2).sum(),
        "scale_min": min(exponents, default=np.inf),
        "scale_max": max(exponents, default=-np.inf),
    }


def assert_report(report, wanted):
    """[operand, tally] of one expert against a dictionary for each operand."""
    report = np.asarray(report).reshape(-1)
    assert not report[REPORT:].any()
    table = report[:REPORT].reshape(len(OPERANDS), len(TALLIES))
    for row, operand, tallies in zip(table, OPERANDS, wanted, strict=True):
        for got, name in zip(row, TALLIES, strict=True):
            np.testing.assert_allclose(got, tallies[name], rtol=1e-5, err_msg=f"{operand} {name}")


def test_a_dense_map_reports_what_was_lost():
    x, w, dy = spread(0, 150, 200), spread(1, 200, 136), spread(2, 150, 136)
    run = {r: jax.jit(lambda x, w, dy, r=r: jax.vjp(r.last_axis, x, w)[1]([dy])) for r in
           (RULE, Watched(**vars(RULE)))}  # fmt: skip
    (dx, _), (same, report) = (f(x, w, dy) for f in run.values())
    np.testing.assert_array_equal(dx, same)
    cached = dequantize(quantize(x, TILE))
    wanted = [counted(a, group) for a, group in zip((x, w, dy), GROUPS, strict=False)]
    wanted += [counted(x, COLUMN, cached), counted(dy, COLUMN)]
    assert wanted[0]["underflow"] > 100 and wanted[3]["underflow"] > wanted[0]["underflow"]
    assert_report(report, wanted)


def test_experts_report_apart_and_padding_is_nothing():
    x, dy = spread(0, 4 * ROWS, 200), spread(2, 4 * ROWS, 136)
    padding = jnp.arange(4 * ROWS) % ROWS >= 11  # the last rows of every block
    padding |= jnp.arange(4 * ROWS) >= 3 * ROWS  # and the block of no expert
    x, dy = (jnp.where(padding[:, None], 0, rows) for rows in (x, dy))
    w = spread(1, EXPERTS, 200, 136)
    rule = Watched(**vars(RULE.after_dispatch.before_combine))
    _, vjp = jax.vjp(lambda x, w: rule.grouped(x, [w], EXPERT_Z)[0], x, w)
    dx, report = jax.jit(vjp)(dy)
    assert dx.shape == x.shape
    for expert in range(EXPERTS):
        blocks = np.flatnonzero(np.asarray(EXPERT_Z) == expert)
        wanted = {operand: [] for operand in OPERANDS}
        wanted["weight"] = [counted(w[expert], BLOCK)]
        for z in blocks:
            rows = np.s_[z * ROWS : (z + 1) * ROWS]
            wanted["activation"].append(counted(x[rows], TILE, powers=True))
            wanted["gradient"].append(counted(dy[rows], TILE, powers=True))
            for name, a in (("activation_column", x), ("gradient_column", dy)):
                sent = dequantize(quantize(a[rows], TILE, "e4m3", True))
                wanted[name].append(counted(a[rows], COLUMN, sent, powers=True))
        table = np.asarray(report[expert]).reshape(-1)[:REPORT].reshape(len(OPERANDS), -1)
        for row, operand in zip(table, OPERANDS, strict=True):
            got, parts = dict(zip(TALLIES, row, strict=True)), wanted[operand]
            for name in ("nonzero", "underflow", "saturated"):
                assert got[name] == sum(part[name] for part in parts), (expert, operand, name)
            lowest = min((part["scale_min"] for part in parts), default=np.inf)
            np.testing.assert_allclose(got["scale_min"], lowest, rtol=1e-6)


def test_swiglu_is_watched_as_it_is_computed_again():
    x = Swiglu(spread(0, 64, 64), spread(1, 64, 64))
    w, dy = spread(2, 64, 64), spread(3, 64, 64)
    kept = value(x.each(lambda x: dequantize(quantize(x, TILE))))
    np.testing.assert_array_equal(reported(RULE, x, w, dy), reported(RULE, kept, w, dy))


def test_experts_multiply_the_same_bytes_whether_rounded_on_the_wire_or_on_arrival():
    layout = layout_of(jnp.array([[0, 2], [2, 1], [0, 1], [1, 2]]), EXPERTS, 4)
    u, first, second = spread(0, 4, 200), spread(1, EXPERTS, 200, 72), spread(2, EXPERTS, 72, 200)

    def experts(rule, u):
        x = dispatch(rule.wire, u, layout)
        [hidden] = rule.after_dispatch.grouped(x, [first], layout.expert_Z)
        [y] = rule.before_combine.grouped(hidden, [second], layout.expert_Z)
        return combine(rule.gradient_wire, y, layout)

    @jax.jit
    def both(u, dy):
        ys, vjps = zip(*(jax.vjp(lambda u, r=r: experts(r, u), u) for r in
                         (RULE, Watched(**vars(RULE)))), strict=True)  # fmt: skip
        return ys, [vjp(dy)[0] for vjp in vjps]

    for plain, watched in both(u, spread(3, 4, 200)):
        np.testing.assert_array_equal(plain, watched)


def reported(rule, x, w, dy):
    """[operand, tally] of a dense map."""
    watched = Watched(**vars(rule))
    _, report = jax.jit(lambda x, w, dy: jax.vjp(watched.last_axis, x, w)[1]([dy]))(x, w, dy)
    return np.asarray(report).reshape(-1)[:REPORT].reshape(len(OPERANDS), len(TALLIES))


@pytest.mark.parametrize("config", [Fp8Dot(groups="tensor"), Fp8Dot(gradient_format="e5m2")])
def test_ablations_are_watched_as_well(config):
    x, w, dy = spread(0, 64, 64), spread(1, 64, 64), spread(2, 64, 64)
    table = reported(Fp8Rule(config), x, w, dy)
    assert (table[:, 0] == [(np.asarray(a) != 0).sum() for a in (x, w, dy, x, dy)]).all()
    lost, kept = table[0, 1], table[2, 1]
    assert 0 < lost and (config.groups == "tensor" or kept < lost / 10)  # E5M2 reaches further


def test_what_is_not_finite_shows():
    x, w, dy = spread(0, 32, 64).at[3, 4].set(jnp.nan), spread(1, 64, 64), spread(2, 32, 64)
    table = reported(RULE, x, w, dy)
    assert np.isnan(table[0]).any() and np.isfinite(table[1:3]).all()
