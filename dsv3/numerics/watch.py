"""FP8 watched: what every operand of every product loses when it is quantised.

A watched rule multiplies exactly as the rule it watches. Only what it hands back for a weight is no
gradient but a report in the weight's shape: `jax.grad` of any loss, by a model that has watched
rules, is a tree of reports, one for each weight and so for each linear map, stacked over layers by
the same scan. There is no side channel, and a training step has nothing to leave out.

    operand              what is quantised                          for
    activation           x, which is also what the wire carries     Fprop
    weight               w                                          Fprop, Dgrad
    gradient             dy, which is also what the wire carries    Dgrad
    activation_column    x as it was cached, grouped anew           Wgrad
    gradient_column      dy as it arrived, grouped anew             Wgrad

Each is compared with its original, so that of two roundings in a row both are seen. For that, rows
travel unrounded to experts, and are rounded on arrival, by the same groups to the same bytes.

A report is [E, operand, tally] (E = 1 where there are no experts), followed by zeros. Zeros never
count, which leaves out the padding rows of experts. Groups scaled by their own largest entry do not
clip; `saturated` are the entries, besides one a group, that are stored as the largest number.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.numerics import fp8
from dsv3.numerics.fp8 import Quantized, dequantize
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.operand import Operand, Swiglu, value
from dsv3.numerics.products import in_blocks
from dsv3.numerics.rule import PlainWire, Wire, blocks

OPERANDS = ("activation", "weight", "gradient", "activation_column", "gradient_column")
SUMS = ("nonzero", "underflow", "saturated", "error", "power")
EXTREMES = ("scale_min", "scale_max")  # log2, of groups that are not all zero
TALLIES = (*SUMS, *EXTREMES)
REPORT = len(OPERANDS) * len(TALLIES)  # numbers, of which a weight needs to have as many


class Watched(Fp8Rule):
    """`Watched(**vars(rule))` watches an Fp8Rule."""

    @property
    def wire(self) -> PlainWire:
        return PlainWire()

    gradient_wire = wire

    def linear(self, x_XI: Operand, ws: tuple[Array, ...]) -> tuple[Array, ...]:
        return _watched(self, x_XI, ws, None)

    def grouped(self, x_PI: Operand, ws: Sequence[Array], expert_Z: Array) -> tuple[Array, ...]:
        return _watched(self, x_PI, tuple(ws), expert_Z)

    @property
    def watched(self) -> Fp8Rule:
        return Fp8Rule(**vars(self))

    def arrived(self, dy: Array) -> Array:
        """dy as Wgrad would find it: rounded once where it comes off the wire."""
        if not self.gradient_powers:
            return dy
        wire: Wire = self.watched.gradient_wire
        return wire.unpack(wire.pack(dy), dy.dtype)


def _plain(rule: Watched, x, ws, expert_Z):
    plain = rule.watched
    return plain.linear(x, ws) if expert_Z is None else plain.grouped(x, ws, expert_Z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(rule: Watched, x, ws, expert_Z):
    return _plain(rule, x, ws, expert_Z)


def _watched_forward(rule, x, ws, expert_Z):
    return _watched(rule, x, ws, expert_Z), (x, ws, expert_Z)


def _watched_backward(rule, residuals, dys):
    x, ws, expert_Z = residuals
    [dx] = jax.vjp(lambda x: _plain(rule, x, ws, expert_Z), x)[1](dys)
    if isinstance(x, Swiglu):  # as it is computed again
        x = value(rule.read(rule.keep(x), x.dtype))
    if expert_Z is None:
        one = jnp.zeros(1, jnp.int32)
        found = [_report(rule, x, w[None], dy, one)[0] for w, dy in zip(ws, dys, strict=True)]
    else:
        found = [_report(rule, x, w, dy, expert_Z) for w, dy in zip(ws, dys, strict=True)]
    return dx, tuple(found), None


_watched.defvjp(_watched_forward, _watched_backward)


def _report(rule: Watched, x_PI: Array, w_EIO: Array, dy_PO: Array, expert_Z: Array) -> Array:
    """The reports of all experts, in w's shape and dtype."""

    def of_rows(original_P, recipe, stored_P):
        tally_ZT = _tally(blocks(original_P, expert_Z), in_blocks(stored_P, recipe, expert_Z))
        return _by_expert(tally_ZT, expert_Z, w_EIO.shape[0])

    tallies_EOT = jnp.stack(
        [
            of_rows(x_PI, rule.activation, x_PI),
            _tally(w_EIO, fp8.quantize(w_EIO, *rule.weight)),
            of_rows(dy_PO, rule.gradient, dy_PO),
            of_rows(x_PI, rule.column, rule.read(rule.keep(x_PI))),
            of_rows(dy_PO, rule.gradient_column, rule.arrived(dy_PO)),
        ],
        axis=1,
    )
    flat = tallies_EOT.reshape(w_EIO.shape[0], -1)
    room = w_EIO[0].size - flat.shape[1]
    if room < 0:
        raise ValueError(f"a weight of shape {w_EIO.shape[1:]} has no room for {REPORT} numbers")
    return jnp.pad(flat, ((0, 0), (0, room))).reshape(w_EIO.shape).astype(w_EIO.dtype)


def _tally(x: Array, q: Quantized) -> Array:
    """FP32 [N, T]: of each matrix of x [N, rows, columns], stored as q, the numbers of TALLIES."""
    x, stored = x.astype(jnp.float32), q.values.astype(jnp.float32)
    largest = jnp.abs(stored) == float(jnp.finfo(q.values.dtype).max)
    used_Nrc, most_Nrc = _any_in_group(x != 0, q), _any_in_group(largest, q)
    exponents = jnp.log2(jnp.broadcast_to(q.scales, used_Nrc.shape))
    unit = 1 / jnp.maximum(jnp.max(jnp.abs(x)), fp8.SMALLEST_SCALE)  # small squares would vanish
    numbers = {
        "nonzero": _sum(x != 0),
        "underflow": _sum((x != 0) & (stored == 0)),
        "saturated": _sum(largest) - _sum(most_Nrc),
        "error": _sum(((dequantize(q) - x) * unit) ** 2),
        "power": _sum((x * unit) ** 2),
        "scale_min": jnp.min(jnp.where(used_Nrc, exponents, jnp.inf), axis=(1, 2)),
        "scale_max": jnp.max(jnp.where(used_Nrc, exponents, -jnp.inf), axis=(1, 2)),
    }
    return jnp.stack([numbers[name] for name in TALLIES], axis=-1)


def _sum(x_NRC: Array) -> Array:
    return jnp.sum(x_NRC.astype(jnp.float32), axis=(1, 2))


def _any_in_group(marked: Array, q: Quantized) -> Array:
    """bool [N, r, c]: the groups that have a marked entry."""
    rows, columns = (
        1 if scales == size else None if scales == 1 else fp8.GROUP
        for scales, size in zip(q.scales.shape[1:], q.values.shape[1:], strict=True)
    )
    return jnp.any(fp8.in_groups(marked, (rows, columns)), axis=(-3, -1))


def _by_expert(tally_ZT: Array, expert_Z: Array, experts: int) -> Array:
    """[E, T]: the blocks of an expert together; blocks not in use belong to none."""
    of_expert_EZ = expert_Z[None, :] == jnp.arange(experts)[:, None]
    among_EZT = of_expert_EZ[:, :, None]
    sums_ET = jnp.sum(jnp.where(among_EZT, tally_ZT[None, :, : len(SUMS)], 0), axis=1)
    low, high = (tally_ZT[None, :, len(SUMS) + i, None] for i in range(2))
    low_E1 = jnp.min(jnp.where(among_EZT, low, jnp.inf), axis=1)
    high_E1 = jnp.max(jnp.where(among_EZT, high, -jnp.inf), axis=1)
    return jnp.concatenate([sums_ET, low_E1, high_E1], axis=-1)
