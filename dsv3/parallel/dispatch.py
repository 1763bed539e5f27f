"""Carrying tokens to their experts and back: the `dispatch` / `combine` pair.

Contract. A plan says for X tokens which rows they become, and which rows are summed for each:

    dispatch(wire, x_XD, plan)  x_PD  row p holds its token, zeros where it is padding
    combine(wire, y_PD, plan)   y_XD  each token's rows summed

Both are linear and each is the other's transpose, so the backward pass of one is the other, and
neither direction needs a scatter-add: both are gathers. What goes to experts is packed by the dot
rule's wires, tokens forward and gradients backward; sums come back in the compute dtype (§3.3.3).
Packing may round: gradients pass straight through that.

There are two plans. `exchange.Route` takes rows to other devices. `Layout`, here, is the last step
of every way and the only one on a single device: `layout_of` sorts all A = X·K assignments of X
tokens to K experts each by expert and pads each expert's rows to whole blocks, P rows in all. No
token is ever dropped: P is a bound that holds for every routing, the assignments rounded so that E
partial blocks fit, or a block for each where they are few. Gates are applied inside the expert, on
its hidden activations (`dispatch_gates`), which leaves `combine` a plain sum.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.numerics.rule import Wire


class Plan(Protocol):
    """Rows from X tokens, P before they leave; some of them may lie elsewhere on their way."""

    @property
    def token_P(self) -> Array: ...  # int32: the token of each row, X or more in padding

    @property
    def row_XK(self) -> Array: ...  # int32: the rows of each token, P where it has fewer

    def there(self, rows_P: Array) -> Array: ...

    def back(self, rows: Array) -> Array: ...


class Layout(NamedTuple):
    """Where every assignment lies in the padded, expert-sorted rows."""

    assignment_P: Array  # int32 [P]: the assignment x·K + k in each row; A marks padding
    row_XK: Array  # int32 [X, K]: the row of each assignment; P where it has no expert here
    expert_Z: Array  # int32 [Z]: the expert of each block of P / Z rows; E in unused blocks, last

    @property
    def token_P(self) -> Array:
        return self.assignment_P // self.row_XK.shape[1]

    def there(self, rows_P: Array) -> Array:
        return rows_P

    def back(self, rows: Array) -> Array:
        return rows


def layout_of(
    experts_XK: Array, routed_experts: int, block: int, most: int | None = None
) -> Layout:
    """Sort the assignments `experts_XK` (int32 [X, K]) by expert and pad each to whole blocks.

    Numbers from E on are no expert. At most `most` assignments have one, or else all may.
    """
    tokens, chosen = experts_XK.shape
    assignments = tokens * chosen
    most = min(most or assignments, assignments)
    total_blocks = min(-(-most // block) + routed_experts, most)  # none is empty
    rows = total_blocks * block
    expert_A = experts_XK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    counts_E = count(experts_XK, routed_experts)
    blocks_E = -(-counts_E // block)
    last_block_E = jnp.cumsum(blocks_E)
    padding_before_E = (last_block_E - blocks_E) * block - (jnp.cumsum(counts_E) - counts_E)
    sorted_A = jnp.arange(assignments, dtype=jnp.int32)
    nowhere = jnp.full(1, rows, padding_before_E.dtype)
    shift_A = jnp.append(padding_before_E, nowhere)[expert_A[order_A]]  # E and beyond: the last
    sorted_row_A = jnp.minimum(sorted_A + shift_A, rows)

    unique = {"unique_indices": True, "mode": "promise_in_bounds"}
    assignment_P = jnp.full(rows, assignments, jnp.int32).at[sorted_row_A].set(order_A, mode="drop")
    row_A = jnp.zeros(assignments, jnp.int32).at[order_A].set(sorted_row_A, **unique)
    expert_Z = jnp.searchsorted(last_block_E, jnp.arange(total_blocks), side="right")
    return Layout(assignment_P, row_A.reshape(tokens, chosen), expert_Z.astype(jnp.int32))


def count(experts_XK: Array, routed_experts: int, valid_X: Array | None = None) -> Array:
    """Tokens sent to each expert, int32 [E]; without those where `valid_X` (bool [X]) is False."""
    chosen_XE = jnp.any(jax.nn.one_hot(experts_XK, routed_experts, dtype=bool), axis=1)
    if valid_X is not None:
        chosen_XE &= valid_X[:, None]
    return jnp.sum(chosen_XE, axis=0, dtype=jnp.int32)


def rows_of(values: Array, index: Array) -> Array:
    """values[index] along the first axis, with zeros beyond its end."""
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(wire: Wire, x_XD: Array, plan: Plan) -> Array:
    """x_PD: the token of every row, as `wire` brings it; zeros where padded."""
    token_P = plan.token_P
    packed = jax.tree.map(lambda leaf: plan.there(rows_of(leaf, token_P)), wire.pack(x_XD))
    return wire.unpack(packed, x_XD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(wire: Wire, y_PD: Array, plan: Plan) -> Array:
    """y_XD: the sum of each token's rows; its gradient travels by `wire`."""
    return _sum(y_PD, plan)


def _sum(y_PD: Array, plan: Plan) -> Array:
    return jnp.sum(rows_of(plan.back(y_PD), plan.row_XK), axis=1)


dispatch.defvjp(
    lambda wire, x_XD, plan: (dispatch(wire, x_XD, plan), plan),
    lambda wire, plan, dx_PD: (_sum(dx_PD, plan), None),
)
combine.defvjp(
    lambda wire, y_PD, plan: (_sum(y_PD, plan), plan),
    lambda wire, plan, dy_XD: (dispatch(wire, dy_XD, plan), None),
)


@jax.custom_vjp
def dispatch_gates(gates_XK: Array, layout: Layout) -> Array:
    """gate_P: the gate of every row; zero where padded."""
    return rows_of(gates_XK.reshape(-1), layout.assignment_P)


dispatch_gates.defvjp(
    lambda gates_XK, layout: (dispatch_gates(gates_XK, layout), layout),
    lambda layout, dgate_P: (rows_of(dgate_P, layout.row_XK), None),
)
