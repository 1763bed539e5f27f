"""What one device of a mesh does that a lone device need not: the model's view of the others.

A step's loss and gradient run as one program per device (`jax.shard_map`, every axis manual): the
device has its rows of the batch, its experts, and its cut of every other parameter. The model is
the same code as on one device. It is handed a `Shard`, a static value like the dot rule, which
does four things: run a function on every device, bring rows to experts (`exchange`), gather a
layer's parameters for use, and take a sum or mean over all devices. `ALONE`, the default, does
nothing at all and is the oracle. What decodes and evaluates goes through the same four.

Gathering is a function with its own derivative. Forward, each device's cut is cast to the format
that products multiply anyway, so BF16 travels and not FP32. Backward, FP32 gradients of the whole
are summed over devices and each keeps its cut: the all-gather's transpose is the reduce-scatter.
Parameters that no axis divides, and experts beyond their own ranks, are summed over what is left.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from dsv3.parallel.exchange import Hop, through_experts


class Place(NamedTuple):
    """How one parameter lies on the mesh, its dimensions counted from the last, -1."""

    experts: tuple[str, ...]  # axes over which dimension -3, the experts, is cut for good
    cuts: tuple[tuple[int, tuple[str, ...]], ...]  # dimension, and axes to gather it over
    rest: tuple[str, ...]  # axes that hold copies
    wire: str  # the dtype in which it travels

    def spec(self, ndim: int) -> jax.P:
        """The partition spec of an array of so many dimensions."""
        axes = dict(self.cuts) | ({-3: self.experts} if self.experts else {})
        return jax.P(*(axes.get(dimension) for dimension in range(-ndim, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(places: tuple[Place, ...], cuts: list[Array]) -> list[Array]:
    """Whole parameters of a device's cuts; gradients are summed over the mesh and cut again."""
    return [_gathered(place, cut) for place, cut in zip(places, cuts, strict=True)]


def _gathered(place: Place, cut: Array) -> Array:
    whole = cut.astype(place.wire) if place.cuts else cut
    for dimension, axes in place.cuts:
        whole = lax.all_gather(whole, axes, axis=dimension % cut.ndim, tiled=True)
    return whole.astype(cut.dtype)


def _scattered(place: Place, gradient: Array) -> Array:
    for dimension, axes in place.cuts:
        gradient = lax.psum_scatter(
            gradient, axes, scatter_dimension=dimension % gradient.ndim, tiled=True
        )
    return gradient


def _summed(places: tuple[Place, ...], gradients: list[Array]) -> list[Array]:
    """Scattered over their cuts; over axes that hold copies, all in one sum."""
    summed = [_scattered(place, g) for place, g in zip(places, gradients, strict=True)]
    for axes in {place.rest for place in places if place.rest}:
        alike = [i for i, place in enumerate(places) if place.rest == axes]
        for i, gradient in zip(alike, lax.psum([summed[i] for i in alike], axes), strict=True):
            summed[i] = gradient
    return summed


gathered.defvjp(
    lambda places, cuts: (gathered(places, cuts), None),
    lambda places, _, gradients: (_summed(places, gradients),),
)

STACKS = ("dense.", "moe.")  # parameters that `lax.scan` walks over, layer by layer


@dataclass(frozen=True)
class Shard:
    """One device of `size` in `mesh`; the batch is cut over the axes `data`, of `data_ranks`
    devices."""

    mesh: Mesh | None = None
    size: int = 1
    data_ranks: int = 1
    data: tuple[str, ...] = ()
    hops: tuple[Hop, ...] = ()  # the way of a token to its experts
    expert_rows: float | None = None
    places: tuple[tuple[str, Place], ...] = ()  # of every parameter, by its path
    by_layer: bool = False  # stacks are gathered in the scan over layers, not before it

    @property
    def rows(self) -> jax.P:
        """The partition spec of what has a row for each sequence of the batch."""
        return jax.P(self.data)

    def specs(self, params, prefix: str = ""):
        """The partition specs of a tree of parameters; what is none of them lies everywhere."""
        places = dict(self.places)

        def one(path, leaf) -> jax.P:
            place = places.get(prefix + path_of(path))
            return place.spec(leaf.ndim) if place else jax.P()

        return jax.tree_util.tree_map_with_path(one, params)

    def each(self, function: Callable, arguments: Any, results: Any) -> Callable:
        """`function` as every device runs it, on its part; partition specs say what that is of each
        argument and result."""
        if self.mesh is None:
            return function
        return functools.partial(_each, self.mesh, function, arguments, results)

    def evaluate(self, function: Callable, model: Any, rows: tuple, results: Any) -> Any:
        """`function(model, *rows)` on every device, with its part of the rows and all parameters,
        but for stacks that are gathered by layer."""
        arguments = self.specs(model), *(self.rows for _ in rows)
        here = self.each(lambda cuts, *own: function(self.params(cuts), *own), arguments, results)
        return here(model, *rows)

    def even(self, rows: int) -> int:
        """The least number of rows from `rows` on that can be cut evenly."""
        return -(-rows // self.data_ranks) * self.data_ranks

    def first(self, rows: int) -> Array | int:
        """Where the `rows` rows of this device begin in the batch."""
        return lax.axis_index(self.data) * rows if self.data else 0

    def as_stored(self, params) -> "Shard":
        """The same, but parameters travel in their own precision, for all kinds of products."""
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        stored = {path_of(path): leaf.dtype.name for path, leaf in flat}
        places = ((name, place._replace(wire=stored[name])) for name, place in self.places)
        return replace(self, places=tuple(places))

    def params(self, cuts):
        """All parameters whole, but for stacks that are gathered by layer."""
        return (
            self._gathered(cuts, "", skip=STACKS if self.by_layer else ()) if self.places else cuts
        )

    def layer(self, stack: str, block):
        """One block of the stack `stack`, whole."""
        return self._gathered(block, stack, skip=()) if self.by_layer else block

    def _gathered(self, tree, prefix: str, skip: tuple[str, ...]):
        places = dict(self.places)
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [prefix + path_of(path) for path, _ in flat]
        leaves = [leaf for _, leaf in flat]
        here = [i for i, name in enumerate(names) if name in places and not name.startswith(skip)]
        whole = gathered(tuple(places[names[i]] for i in here), [leaves[i] for i in here])
        for i, leaf in zip(here, whole, strict=True):
            leaves[i] = leaf
        return structure.unflatten(leaves)

    def experts(self, dot, work, weights, u_XD: Array, experts_XK: Array, gates_XK: Array) -> Array:
        """`work` on the rows of every expert, wherever it lives; see `exchange`."""
        operands = u_XD, experts_XK, gates_XK
        return through_experts(self.hops, self.expert_rows, dot, work, weights, *operands)

    def mean(self, x: Array) -> Array:
        """Over the pieces of the batch."""
        return lax.pmean(x, self.data) if self.data else x

    def sum(self, tree):
        """Over the pieces of the batch."""
        return lax.psum(tree, self.data) if self.data else tree


ALONE = Shard()


def _each(mesh: Mesh, function: Callable, specs: Any, results: Any, *arguments: Any) -> Any:
    """`function(*arguments)` by `jax.shard_map`, every axis manual.

    Arrays of no numbers are made anew on every device: XLA of jax 0.11 dies of them as arguments.
    """
    leaves, structure = jax.tree.flatten(arguments)
    spec_of = jax.tree.leaves(jax.tree.broadcast(specs, arguments))
    full = [i for i, leaf in enumerate(leaves) if leaf.size]

    def here(*given: Array) -> Any:
        own = dict(zip(full, given, strict=True))
        for i in range(len(leaves)):
            if i not in own:
                shape = NamedSharding(mesh, spec_of[i]).shard_shape(leaves[i].shape)
                own[i] = jnp.zeros(shape, leaves[i].dtype)
        return function(*structure.unflatten(own[i] for i in range(len(leaves))))

    in_specs = tuple(spec_of[i] for i in full)
    mapped = jax.shard_map(here, mesh=mesh, in_specs=in_specs, out_specs=results, check_vma=False)
    return mapped(*(leaves[i] for i in full))


def path_of(path) -> str:
    """The name of a parameter in the model, 'moe.attention.o.w', from its path in a tree."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")
