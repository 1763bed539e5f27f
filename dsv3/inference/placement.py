"""Where experts live when a model is served: redundant experts and their placement (§3.4).

Loads differ between experts, and the device with the heaviest ones makes all others wait. So there
are more physical slots than experts: heavy experts get replicas, and the slots are packed on
devices of equal slot counts such that the loads come out even. This is the algorithm of DeepSeek's
EPLB, for every layer on its own:

    pack        n items into packs of equal size, heaviest first, each into the lightest open pack
    replicate   a replica each, then one more for whichever expert has most load a replica
    place       groups of experts to nodes (pack), replicas inside each node (replicate), slots to
                the devices of the node (pack)

With groups that nodes divide, a group stays on one node, which node-limited routing wants
(prefill, 'hierarchical'); otherwise nodes and groups are ignored ('global', decode with large
expert parallelism). Both are one function: global is the hierarchy of one node and one group.
Greedy throughout; ties go to the lower index, so equal loads give equal placements. Slots are
numbered device by device: slot y lies on device y // (Y / devices), which is what sharding the slot
axis over the devices does.

Host code in numpy: X are independent rows (layers, or layers times nodes), n items of any kind.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3.errors import ConfigError, DataError


class Placement(NamedTuple):
    """Which expert each slot holds, under the names of the field; int64."""

    phy2log_LY: np.ndarray  # the expert of each physical slot
    log2phy: np.ndarray  # [L, E, most replicas]: the slots of each expert in order, then -1
    logcnt_LE: np.ndarray  # how many slots hold each expert


def pack(weight_Xn: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Each item's pack and its place there, both [X, n]; every pack holds n / packs items."""
    rows, items = weight_Xn.shape
    size = items // packs
    if size == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    pack_Xn, place_Xn = np.empty((2, rows, items), np.int64)
    for row, order_n in enumerate(np.argsort(-weight_Xn, axis=1, kind="stable")):
        fill = [0] * packs
        open_packs = [(0.0, p) for p in range(packs)]  # a heap: the lightest first, then the lowest
        for item, weight in zip(order_n, weight_Xn[row, order_n].tolist(), strict=True):
            total, lightest = heapq.heappop(open_packs)
            pack_Xn[row, item], place_Xn[row, item] = lightest, fill[lightest]
            fill[lightest] += 1
            if fill[lightest] < size:
                heapq.heappush(open_packs, (total + weight, lightest))
    return pack_Xn, place_Xn


def replicate(weight_Xn: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The item of each slot [X, slots] and the replicas of each item [X, n].

    Slot i < n holds item i; each further one the item that has most weight a replica by then.
    """
    rows, items = weight_Xn.shape
    each_X = np.arange(rows)
    item_Xs = np.tile(np.arange(slots), (rows, 1))
    count_Xn = np.ones((rows, items), np.int64)
    for slot in range(items, slots):
        item_Xs[:, slot] = heaviest_X = np.argmax(weight_Xn / count_Xn, axis=1)
        count_Xn[each_X, heaviest_X] += 1
    return item_Xs, count_Xn


def place(
    load_LE: np.ndarray, slots: int, *, groups: int = 1, nodes: int = 1, devices: int = 1
) -> Placement:
    """Place `slots` replicas of E experts on `devices` by their loads, in any unit.

    Raises ConfigError where slots, devices, nodes or groups do not divide, DataError for loads
    that are negative or not finite, or where there are none.
    """
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or not (np.isfinite(load_LE) & (load_LE >= 0)).all():
        raise DataError("loads must be numbers [layers, experts], finite and not negative")
    layers, experts = load_LE.shape
    if not layers:
        raise DataError("there are no loads: the model has no MoE layer")
    if groups < 1 or nodes < 1 or groups % nodes:
        groups, nodes = 1, 1
    _check(experts, slots, groups, nodes, devices)

    # Experts in the order of their nodes; `near` is an expert's position there.
    in_group = experts // groups
    node_LG, place_LG = pack(load_LE.reshape(layers, groups, in_group).sum(-1), nodes)
    first_LG1 = (node_LG * (groups // nodes) + place_LG)[:, :, None] * in_group
    log2near_LE = (first_LG1 + np.arange(in_group)).reshape(layers, experts)
    near2log_LE = np.argsort(log2near_LE, axis=1)

    # Replicas inside each node, then its slots onto its devices.
    load_Xn = np.take_along_axis(load_LE, near2log_LE, axis=1).reshape(layers * nodes, -1)
    item_Xs, count_Xn = replicate(load_Xn, slots // nodes)
    device_Xs, place_Xs = pack(np.take_along_axis(load_Xn / count_Xn, item_Xs, axis=1),
                               devices // nodes)  # fmt: skip
    order_Xs = np.argsort(device_Xs * (slots // devices) + place_Xs, axis=1)
    near_LNs = np.take_along_axis(item_Xs, order_Xs, axis=1).reshape(layers, nodes, -1)
    near_LNs += np.arange(nodes)[:, None] * (experts // nodes)
    phy2log_LY = np.take_along_axis(near2log_LE, near_LNs.reshape(layers, slots), axis=1)
    return placement_of(phy2log_LY, experts)


def _check(experts: int, slots: int, groups: int, nodes: int, devices: int) -> None:
    if devices < 1 or slots % devices:
        raise ConfigError(f"{slots} slots do not divide over {devices} devices")
    if devices % nodes:
        raise ConfigError(f"{devices} devices do not divide over {nodes} nodes")
    if experts % groups:
        raise ConfigError(f"{experts} experts do not divide into {groups} groups")
    if slots < experts:
        raise ConfigError(f"{slots} slots cannot hold {experts} experts")


def placement_of(phy2log_LY: np.ndarray | Sequence[Sequence[int]], experts: int) -> Placement:
    """The placement with these experts in its slots. Raises DataError where one has no slot, or a
    slot no expert."""
    phy2log_LY = np.asarray(phy2log_LY, np.int64)
    layers, slots = phy2log_LY.shape
    if phy2log_LY.min(initial=0) < 0 or phy2log_LY.max(initial=0) >= experts:
        raise DataError(f"a slot holds an expert outside 0 to {experts - 1}")
    count_LE = np.zeros((layers, experts), np.int64)
    np.add.at(count_LE, (np.arange(layers)[:, None], phy2log_LY), 1)
    if missing := np.argwhere(count_LE == 0).tolist():
        layer, expert = missing[0]
        raise DataError(f"expert {expert} of layer {layer} has no slot")
    slot_LY = np.argsort(phy2log_LY, axis=1, kind="stable")
    expert_LY = np.take_along_axis(phy2log_LY, slot_LY, axis=1)
    first_LE = np.cumsum(count_LE, axis=1) - count_LE
    rank_LY = np.arange(slots) - np.take_along_axis(first_LE, expert_LY, axis=1)
    log2phy = np.full((layers, experts, count_LE.max(initial=1)), -1, np.int64)
    log2phy[np.arange(layers)[:, None], expert_LY, rank_LY] = slot_LY
    return Placement(phy2log_LY, log2phy, count_LE)


def device_loads(load_LE: np.ndarray, placement: Placement, devices: int) -> np.ndarray:
    """The load of each device [L, devices] when replicas share their expert's load evenly."""
    share_LE = np.asarray(load_LE, np.float64) / placement.logcnt_LE
    share_LY = np.take_along_axis(share_LE, placement.phy2log_LY, axis=1)
    return share_LY.reshape(len(share_LY), devices, -1).sum(-1)


def imbalance(load_Ld: np.ndarray) -> np.ndarray:
    """The heaviest device's load over the mean, for each layer; 1 where nothing is loaded."""
    mean_L = load_Ld.mean(axis=-1)
    return np.where(mean_L > 0, load_Ld.max(axis=-1) / np.maximum(mean_L, 1e-300), 1.0)
