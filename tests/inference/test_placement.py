import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import ConfigError, DataError
from dsv3.inference.placement import (
    device_loads,
    imbalance,
    pack,
    place,
    placement_of,
    replicate,
)

# The example in EPLB's README: two layers, 12 experts in 4 groups, 2 nodes of 4 devices.
LOADS = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
])  # fmt: skip
PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    found = place(LOADS, 16, groups=4, nodes=2, devices=8)
    assert found.phy2log_LY.tolist() == PHY2LOG
    assert found.logcnt_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert found.log2phy[0, 5].tolist() == [0, 2] and found.log2phy[0, 0].tolist() == [12, -1]


@st.composite
def cases(draw):
    """(loads, slots, groups, nodes, devices) that divide."""
    nodes, devices = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, in_group = nodes * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    per_node = groups // nodes * in_group
    slots_a_device = -(-per_node // devices) + draw(st.integers(0, 2))
    experts, layers = groups * in_group, draw(st.integers(1, 2))
    loads = draw(st.lists(st.integers(0, 50), min_size=layers * experts, max_size=layers * experts))
    loads = np.array(loads).reshape(layers, experts)
    return loads, slots_a_device * devices * nodes, groups, nodes, devices * nodes


@given(cases())
def test_every_expert_has_a_slot_and_the_three_tables_agree(case):
    loads, slots, groups, nodes, devices = case
    found = place(loads, slots, groups=groups, nodes=nodes, devices=devices)
    layers, experts = loads.shape
    assert found.phy2log_LY.shape == (layers, slots)
    for layer, expert in np.ndindex(layers, experts):
        where = np.flatnonzero(found.phy2log_LY[layer] == expert)
        listed = found.log2phy[layer, expert]
        assert len(where) == found.logcnt_LE[layer, expert] >= 1
        assert listed.tolist() == [*where, *[-1] * (len(listed) - len(where))]


@given(cases())
def test_no_load_is_lost_and_groups_stay_on_their_node(case):
    loads, slots, groups, nodes, devices = case
    found = place(loads, slots, groups=groups, nodes=nodes, devices=devices)
    loads_Ld = device_loads(loads, found, devices)
    np.testing.assert_allclose(loads_Ld.sum(1), loads.sum(1), rtol=1e-12)
    node_Y = np.arange(slots) // (slots // nodes)
    group_LY = found.phy2log_LY // (loads.shape[1] // groups)
    for layer in range(len(loads)):
        homes = {(group, node) for group, node in zip(group_LY[layer], node_Y, strict=True)}
        assert len(homes) == groups


@given(cases())
def test_a_layer_is_placed_alone_and_always_the_same(case):
    loads, slots, groups, nodes, devices = case
    options = {"groups": groups, "nodes": nodes, "devices": devices}
    whole = place(loads, slots, **options).phy2log_LY
    alone = [place(row[None], slots, **options).phy2log_LY[0] for row in loads]
    assert (whole == alone).all()
    assert (whole == place(loads * 4.0, slots, **options).phy2log_LY).all()  # any unit


@given(st.lists(st.integers(0, 30), min_size=1, max_size=24), st.integers(1, 4))
def test_packs_are_equal_in_size_and_as_even_as_greedy_allows(weights, size):
    weights = np.array(weights[: max(len(weights) // size, 1) * size], float)
    packs = max(len(weights) // size, 1)
    pack_n, place_n = (x[0] for x in pack(weights[None], packs))
    assert (np.bincount(pack_n, minlength=packs) == len(weights) // packs).all()
    for p in range(packs):
        assert sorted(place_n[pack_n == p]) == list(range(len(weights) // packs))
    # a pack that is not the lightest got its last item while it was: they differ by one item
    loads = np.bincount(pack_n, weights, minlength=packs)
    if len(weights) // packs > 1:
        assert loads.max() - loads.min() <= weights.max() * (len(weights) // packs - 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 4))
def test_replicas_are_the_best_possible_and_more_are_never_worse(weights, redundant):
    weights = np.array(weights, float)
    items = len(weights)
    heaviest = []
    for slots in range(items, items + redundant + 1):
        item_s, count_n = (x[0] for x in replicate(weights[None], slots))
        assert np.bincount(item_s, minlength=items).tolist() == count_n.tolist()
        heaviest.append((weights / count_n).max())
    assert heaviest == sorted(heaviest, reverse=True)
    choices = itertools.product(range(1, redundant + 2), repeat=items)
    counts = [np.array(c) for c in choices if sum(c) == items + redundant]
    assert heaviest[-1] == min((weights / count).max() for count in counts)


def test_ties_go_to_the_lower_index():
    even = np.ones((1, 6))
    assert pack(even, 3)[0].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert replicate(even, 8)[0].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert place(even, 6, devices=6).phy2log_LY.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_replicas_even_the_devices_out():
    loads = np.random.default_rng(0).lognormal(0, 1, (61, 256))
    before = imbalance(device_loads(loads, placement_of(np.tile(range(256), (61, 1)), 256), 32))
    started = time.process_time()
    prefill = place(loads, 288, groups=8, nodes=4, devices=32)
    everywhere = place(loads, 320, devices=320)
    assert time.process_time() - started < 2  # seconds, for a plan made every ten minutes
    after = imbalance(device_loads(loads, prefill, 32))
    assert (after < before).all() and after.mean() < 1.15 < 1.5 < before.mean()
    one_each = loads.max(1) / loads.mean(1)
    assert (imbalance(device_loads(loads, everywhere, 320)) < one_each).all()


def test_without_load_everything_is_even():
    assert imbalance(np.zeros((2, 3))).tolist() == [1, 1]
    assert place(np.zeros((1, 4)), 8, devices=4).logcnt_LE.sum() == 8


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        (16, {"devices": 5}, "16 slots do not divide over 5 devices"),
        (16, {"devices": 0}, "16 slots do not divide over 0 devices"),
        (8, {"devices": 8}, "8 slots cannot hold 12 experts"),
        (15, {"groups": 4, "nodes": 2, "devices": 5}, "5 devices do not divide over 2 nodes"),
        (15, {"groups": 5, "nodes": 5, "devices": 5}, "12 experts do not divide into 5 groups"),
    ],
)
def test_numbers_that_do_not_divide_are_named(slots, options, message):
    with pytest.raises(ConfigError, match=message):
        place(LOADS, slots, **options)


@pytest.mark.parametrize("loads", [[[1.0, -1.0]], [[1.0, np.nan]], [[1.0, np.inf]], [1.0, 2.0]])
def test_loads_that_cannot_be(loads):
    with pytest.raises(DataError, match="finite and not negative"):
        place(np.array(loads), 2)


def test_placements_that_cannot_be():
    with pytest.raises(DataError, match="expert 1 of layer 0 has no slot"):
        placement_of([[0, 2, 2]], 3)
    with pytest.raises(DataError, match="outside 0 to 1"):
        placement_of([[0, 1, 2]], 2)
