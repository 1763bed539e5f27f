import numpy as np
import pytest

from benchmarks.placement import table, units
from dsv3.errors import UserError
from dsv3.inference.placement import device_loads


def test_the_units_are_the_reports():
    prefill, decode = units(256, groups=8, layers=2, keep=0.9)
    assert (prefill.balancer.slots, prefill.balancer.devices, prefill.balancer.nodes) == (
        288,
        32,
        4,
    )
    assert (decode.balancer.slots, decode.balancer.devices) == (320, 320)
    counts_LE = np.full((2, 256), 10)
    assert prefill.loads(counts_LE, chosen=8) is counts_LE
    load_LE = decode.loads(counts_LE, chosen=8)
    assert load_LE[:, 256].tolist() == [320, 320]  # 2,560 assignments of 320 tokens
    assert decode.imbalance(load_LE, decode.before) == pytest.approx(10 / (2880 / 320))
    assert device_loads(counts_LE, prefill.before, 32).tolist() == [[80.0] * 32] * 2


def test_small_models_get_smaller_units():
    prefill, decode = units(16, groups=4, layers=1, keep=0.9)
    assert prefill.name == "prefill: 2 devices on 2 nodes, 18 slots"
    assert decode.name == "decode: 20 devices of one slot"
    with pytest.raises(UserError, match="12 experts"):
        units(12, groups=4, layers=1, keep=0.9)


def test_a_row_holds_means_and_worst():
    values = np.array([[[2.0, 1.5, 1.0], [4.0, 1.5, 1.0]]])
    *_, row = table({("unit", "text"): values})
    assert row == "| unit | text | 1 | 3.00 (4.00) | 1.50 (1.50) | 1.00 (1.00) |"
