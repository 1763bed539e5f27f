"""Carrying tokens to experts on other devices, and sums back (§3.2.2): hops of one kind.

A hop spreads tokens over the ranks of some axes, among which the experts are divided in order. A
token goes once to each rank that holds any of its experts, with the list of its experts and gates,
and comes back as the sum of what that rank made of it. So

    all_to_all     one hop over (node, local)
    node_limited   a hop over node, then one over local: between nodes a token crosses once for
                   each node it is sent to, at most `groups_per_token` copies, to the device with
                   its own local rank; there it fans out. Going back, the partial sums of a node are
                   added up inside it before one row crosses.

A hop is a `Route` for `dispatch.dispatch` and `combine`: rows are gathered in the order of their
ranks, exchanged, and gathered again on the way back. Each is the other's transpose, so gradients
take the same ways, packed by the dot rule's wires; sums travel in the compute dtype.

Exchange. Every rank learns how many rows each sends to each (`sizes`, one tiny all-gather). Where
the platform has `lax.ragged_all_to_all` exactly those rows travel. XLA:CPU has not: there rows are
padded to equal pieces for `lax.all_to_all` and put together again on arrival, same numbers.

Memory. No routing drops a row, so buffers hold the worst case unless `expert_rows` bounds them. A
hop over n ranks receives at most n · X rows from X tokens each; experts then have min(K, experts
on the device) rows for each. With the report's sequence of 4096 tokens a device, 64 ranks of 4
experts: 32,768 rows after the first hop, 262,144 after the second, 1,048,576 expert rows of 14 KiB
in BF16, 14 GiB for each such array, where an even load fills 32,768 rows, 0.44 GiB. Hence
`expert_rows` = c: a device takes at most c times its even share, X · K rows, in a pass; what
is more waits for a second, third, ... pass, which all ranks make together and only when some rank
needs it. The first pass is ordinary code that keeps what its backward pass wants; later ones keep
nothing and are computed again.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv3.numerics.rule import DotRule, PlainWire
from dsv3.parallel.dispatch import combine, dispatch, rows_of


class Hop(NamedTuple):
    """Over the ranks of `axes`; no token has experts on more than `copies` of them."""

    axes: tuple[str, ...]
    ranks: int
    copies: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_P", "row_XK", "sizes_nn"),
    meta_fields=("axes", "arrivals"),
)
@dataclass(frozen=True)
class Route:
    """Where the copies of X tokens go: rows sorted by rank, what arrives sorted by sender."""

    token_P: Array  # int32 [P]: the token of each row to send; X marks padding
    row_XK: Array  # int32 [X, copies]: the rows of each token; P where it has fewer
    sizes_nn: Array  # int32 [ranks, ranks]: rows from each to each
    axes: tuple[str, ...]
    arrivals: int  # rows that arrive at most

    def there(self, rows_P: Array) -> Array:
        return exchange(rows_P, self.sizes_nn, self.axes, self.row_XK.shape[0], self.arrivals)

    def back(self, rows: Array) -> Array:
        tokens, rows_sent = self.row_XK.shape[0], self.token_P.shape[0]
        return exchange(rows, self.sizes_nn.T, self.axes, tokens, rows_sent)


def goes_to(experts_XK: Array, experts: int, hop: Hop) -> Array:
    """Whether any of a token's experts lives on a rank of the hop, bool [X, ranks]."""
    rank_XK = experts_XK // (experts // hop.ranks)
    goes_Xn = jnp.any(jax.nn.one_hot(rank_XK, hop.ranks, dtype=bool), axis=1)
    return goes_Xn & (jnp.cumsum(goes_Xn, axis=1) <= hop.copies)  # holds anyway; buffers rely on it


def route_of(experts_XK: Array, experts: int, hop: Hop, arrivals: int) -> Route:
    """The route of one hop; `experts` are divided among its ranks, others are no one's."""
    tokens = experts_XK.shape[0]
    rows = tokens * hop.copies
    goes_Xn = goes_to(experts_XK, experts, hop)
    counts_n = jnp.sum(goes_Xn, axis=0, dtype=jnp.int32)
    before_Xn = jnp.cumsum(goes_Xn, axis=0, dtype=jnp.int32) - goes_Xn
    row_Xn = jnp.where(goes_Xn, before_Xn + _starts(counts_n)[None, :], rows)
    token_Xn = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], row_Xn.shape)
    token_P = jnp.full(rows, tokens, jnp.int32).at[row_Xn].set(token_Xn, mode="drop")
    row_XK = jnp.sort(row_Xn, axis=1)[:, : hop.copies]
    sizes_nn = lax.all_gather(counts_n, hop.axes)
    route = Route(token_P, row_XK, sizes_nn, hop.axes, arrivals)
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "routing"), route)


def through_experts(
    hops: tuple[Hop, ...], share: float | None, dot: DotRule, work: Callable, weights,
    u_XD: Array, experts_XK: Array, gates_XK: Array,
) -> Array:  # fmt: skip
    """y_XD: for each token the sum over its experts, which `hops` lead to.

    `work(weights, rows, u_XD, experts_XK, gates_XK)` is that sum on one device, of its own experts,
    numbered from 0; any other number is none. `rows` bounds the pairs of token and expert.
    """
    ranks = math.prod(hop.ranks for hop in hops)
    mine = jax.tree.leaves(weights)[0].shape[0]
    tokens, chosen = experts_XK.shape
    worst = ranks * tokens * min(chosen, mine)
    rows = worst if share is None else min(worst, math.ceil(share * tokens * chosen))
    one_pass = functools.partial(_one_pass, hops, rows, dot, work, mine * ranks)
    if rows == worst:
        return one_pass(weights, u_XD, experts_XK, gates_XK)
    pass_XK, passes = passes_of(experts_XK, mine, hops, rows)
    first_XK = jnp.where(pass_XK == 0, experts_XK, -1)
    y_XD = one_pass(weights, u_XD, first_XK, gates_XK)
    routing = experts_XK, pass_XK, passes
    return y_XD + _later_passes(one_pass, weights, u_XD, gates_XK, routing)


def _one_pass(hops, rows, dot, work, experts, weights, u_XD, experts_XK, gates_XK) -> Array:
    if not hops:
        return work(weights, rows, u_XD, experts_XK, gates_XK)
    hop, *rest = hops
    beyond = math.prod(further.ranks for further in rest)
    arrivals = min(hop.ranks * u_XD.shape[0], rows * beyond)
    route = route_of(experts_XK, experts, hop, arrivals)
    u_YD = dispatch(dot.wire, u_XD, route)
    gates_YK = dispatch(PlainWire(), gates_XK, route)
    # Numbers travel plus one, so that padding, zero, is no expert.
    there_YK = route.there(rows_of(experts_XK + 1, route.token_P)) - 1
    fewer = experts // hop.ranks
    own_YK = there_YK - lax.axis_index(hop.axes) * fewer
    own_YK = jnp.where((own_YK >= 0) & (own_YK < fewer) & (there_YK >= 0), own_YK, fewer)
    if fewer < own_YK.shape[1]:  # a token has no more experts here than there are
        order_YK = jnp.argsort(own_YK, axis=1)[:, :fewer]
        own_YK, gates_YK = (jnp.take_along_axis(x, order_YK, 1) for x in (own_YK, gates_YK))
    y_YD = _one_pass(tuple(rest), rows, dot, work, fewer, weights, u_YD, own_YK, gates_YK)
    return combine(dot.gradient_wire, y_YD, route)


def passes_of(experts_XK: Array, mine: int, hops: tuple[Hop, ...], rows: int):
    """The pass in which each expert of each token has its turn, int32 [X, K], and their number.

    A rank takes `rows` of what is sent to it in a pass, in the order of senders and of their
    tokens. All ranks come to the same number.
    """
    axes = tuple(axis for hop in hops for axis in hop.axes)
    ranks = math.prod(hop.ranks for hop in hops)
    is_Xn = jax.nn.one_hot((experts_XK // mine).reshape(-1), ranks, dtype=jnp.int32)
    sizes_nn = lax.all_gather(jnp.sum(is_Xn, axis=0), axes)
    before_n = _starts(sizes_nn)[lax.axis_index(axes)]
    place_An = jnp.cumsum(is_Xn, axis=0) - 1 + before_n[None, :]
    pass_A = jnp.sum(place_An * is_Xn, axis=1) // rows
    return pass_A.reshape(experts_XK.shape), -(-jnp.max(jnp.sum(sizes_nn, axis=0)) // rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_passes(one_pass: Callable, weights, u_XD: Array, gates_XK: Array, routing) -> Array:
    experts_XK, pass_XK, passes = routing

    def add(number, y_XD):
        now_XK = jnp.where(pass_XK == number, experts_XK, -1)
        return y_XD + one_pass(weights, u_XD, now_XK, gates_XK)

    return lax.fori_loop(1, passes, add, jnp.zeros_like(u_XD))


def _later_passes_backward(one_pass: Callable, operands, dy_XD: Array):
    weights, u_XD, gates_XK, (experts_XK, pass_XK, passes) = operands

    def add(number, sums):
        now_XK = jnp.where(pass_XK == number, experts_XK, -1)
        _, pull = jax.vjp(lambda w, u, g: one_pass(w, u, now_XK, g), weights, u_XD, gates_XK)
        return jax.tree.map(jnp.add, sums, pull(dy_XD))

    zeros = jax.tree.map(jnp.zeros_like, (weights, u_XD, gates_XK))
    return *lax.fori_loop(1, passes, add, zeros), None


_later_passes.defvjp(
    lambda one_pass, *operands: (_later_passes(one_pass, *operands), operands),
    _later_passes_backward,
)


# --- the exchange ------------------------------------------------------------------------------


def exchange(rows: Array, sizes_nn: Array, axes: tuple[str, ...], most: int, arrivals: int):
    """Rows sorted by the rank they are for -> [arrivals, ...] sorted by the rank they are from.

    `sizes_nn[s, d]` rows go from s to d, never more than `most`; rows beyond those are zero.
    """
    return lax.platform_dependent(
        rows, sizes_nn,
        cpu=functools.partial(padded_exchange, axes=axes, most=most, arrivals=arrivals),
        default=functools.partial(ragged_exchange, axes=axes, arrivals=arrivals),
    )  # fmt: skip


def ragged_exchange(rows: Array, sizes_nn: Array, axes: tuple[str, ...], arrivals: int) -> Array:
    """Exactly the rows there are."""
    me = lax.axis_index(axes)
    sent_n, received_n = sizes_nn[me], sizes_nn[:, me]
    empty = jnp.zeros((arrivals, *rows.shape[1:]), rows.dtype)
    return lax.ragged_all_to_all(
        rows, empty, _starts(sent_n), sent_n, _starts(sizes_nn)[me], received_n, axis_name=axes
    )


def padded_exchange(
    rows: Array, sizes_nn: Array, axes: tuple[str, ...], most: int, arrivals: int
) -> Array:
    """Pieces of `most` rows each, for XLA:CPU."""
    me = lax.axis_index(axes)
    sent_n, received_n = sizes_nn[me], sizes_nn[:, me]
    ranks = sizes_nn.shape[0]
    slot_m = jnp.arange(most, dtype=jnp.int32)[None, :]
    source_nm = jnp.where(slot_m < sent_n[:, None], _starts(sent_n)[:, None] + slot_m, len(rows))
    arrived_nm = lax.all_to_all(rows_of(rows, source_nm), axes, 0, 0, tiled=True)
    place = jnp.arange(arrivals, dtype=jnp.int32)
    ends_n = jnp.cumsum(received_n)
    sender = jnp.searchsorted(ends_n, place, side="right").astype(jnp.int32)
    slot = place - _starts(received_n)[jnp.minimum(sender, ranks - 1)]
    flat = jnp.where(sender < ranks, sender * most + slot, ranks * most)
    return rows_of(arrived_nm.reshape(ranks * most, *rows.shape[1:]), flat)


def _starts(sizes: Array) -> Array:
    """Where pieces of such sizes begin, one after the other along the first axis."""
    return jnp.cumsum(sizes, axis=0) - sizes
