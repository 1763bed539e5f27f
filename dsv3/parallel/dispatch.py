"""Carrying tokens to their experts and back: the `dispatch` / `combine` pair.

Contract. `layout_of` turns the routing of X tokens to K experts each into a `Layout`: all A = X·K
assignments sorted by expert, each expert's rows padded to whole blocks, P rows in all. No token is
ever dropped: P is a bound that holds for every routing, P = A rounded so that E partial blocks fit.

    dispatch(wire, x_XD, layout)  x_PD  row p holds the token of assignment p, zeros where padded
    combine(wire, y_PD, layout)   y_XD  each token's K rows summed
    dispatch_gates(g_XK, layout)  g_P   the gate of each row, zero where padded

Both are linear and each is the other's transpose, so the backward pass of one is the other, and
neither direction needs a scatter-add: both are gathers. Gates are applied inside the expert, on its
hidden activations, which leaves `combine` a plain sum. What goes to experts is packed by the dot
rule's wires, tokens forward and gradients backward; sums come back in the compute dtype (§3.3.3).
Packing may round: gradients pass straight through that.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.numerics.rule import Wire


class Layout(NamedTuple):
    """Where every assignment lies in the padded, expert-sorted rows."""

    assignment_P: Array  # int32 [P]: the assignment x·K + k in each row; A marks padding
    row_XK: Array  # int32 [X, K]: the row of each assignment
    expert_Z: Array  # int32 [Z]: the expert of each block of P / Z rows; E in unused blocks, last


def layout_of(experts_XK: Array, routed_experts: int, block: int) -> Layout:
    """Sort the assignments `experts_XK` (int32 [X, K]) by expert and pad each to whole blocks."""
    tokens, chosen = experts_XK.shape
    assignments = tokens * chosen
    total_blocks = -(-assignments // block) + routed_experts
    expert_A = experts_XK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    counts_E = count(experts_XK, routed_experts)
    blocks_E = -(-counts_E // block)
    last_block_E = jnp.cumsum(blocks_E)
    padding_before_E = (last_block_E - blocks_E) * block - (jnp.cumsum(counts_E) - counts_E)
    sorted_row_A = jnp.arange(assignments, dtype=jnp.int32) + padding_before_E[expert_A[order_A]]

    rows = total_blocks * block
    unique = {"unique_indices": True, "mode": "promise_in_bounds"}
    assignment_P = jnp.full(rows, assignments, jnp.int32).at[sorted_row_A].set(order_A, **unique)
    row_A = jnp.zeros(assignments, jnp.int32).at[order_A].set(sorted_row_A, **unique)
    expert_Z = jnp.searchsorted(last_block_E, jnp.arange(total_blocks), side="right")
    return Layout(assignment_P, row_A.reshape(tokens, chosen), expert_Z.astype(jnp.int32))


def count(experts_XK: Array, routed_experts: int, valid_X: Array | None = None) -> Array:
    """Tokens sent to each expert, int32 [E]; without those where `valid_X` (bool [X]) is False."""
    chosen_XE = jnp.any(jax.nn.one_hot(experts_XK, routed_experts, dtype=bool), axis=1)
    if valid_X is not None:
        chosen_XE &= valid_X[:, None]
    return jnp.sum(chosen_XE, axis=0, dtype=jnp.int32)


def _rows(values_A: Array, assignment_P: Array) -> Array:
    """values[assignment] with zeros in the padding rows."""
    return values_A.at[assignment_P].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(wire: Wire, x_XD: Array, layout: Layout) -> Array:
    """x_PD: the token of every row, as `wire` brings it; zeros where padded."""
    token_P = layout.assignment_P // layout.row_XK.shape[1]
    packed_P = jax.tree.map(lambda leaf_X: _rows(leaf_X, token_P), wire.pack(x_XD))
    return wire.unpack(packed_P, x_XD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(wire: Wire, y_PD: Array, layout: Layout) -> Array:
    """y_XD: the sum of each token's rows; its gradient travels by `wire`."""
    return _sum(y_PD, layout)


def _sum(y_PD: Array, layout: Layout) -> Array:
    return jnp.sum(y_PD[layout.row_XK], axis=1)


dispatch.defvjp(
    lambda wire, x_XD, layout: (dispatch(wire, x_XD, layout), layout),
    lambda wire, layout, dx_PD: (_sum(dx_PD, layout), None),
)
combine.defvjp(
    lambda wire, y_PD, layout: (_sum(y_PD, layout), layout),
    lambda wire, layout, dy_XD: (dispatch(wire, dy_XD, layout), None),
)


@jax.custom_vjp
def dispatch_gates(gates_XK: Array, layout: Layout) -> Array:
    """gate_P: the gate of every row; zero where padded."""
    return _rows(gates_XK.reshape(-1), layout.assignment_P)


dispatch_gates.defvjp(
    lambda gates_XK, layout: (dispatch_gates(gates_XK, layout), layout),
    lambda layout, dgate_P: (dgate_P[layout.row_XK], None),
)
