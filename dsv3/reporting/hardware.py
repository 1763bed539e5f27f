"""What devices and links are taken to do, each figure with its source.

Rates are a device's and one way. What software reaches of a tensor core is an assumption, and the
largest in any step time that is computed from these; links are given as what was measured on them.
"""

from typing import NamedTuple

TERA, GIGA = 1e12, 1e9

H800_BF16 = 989 * TERA  # dense, NVIDIA's data sheet of the H100 SXM, whose tensor cores these are
H800_FP8 = 1979 * TERA  # dense, the same sheet
H800_MEMORY = 80 * GIGA  # bytes, the same
H800_NVLINK = 160 * GIGA  # bytes/s, report §3.2.2
H800_INFINIBAND = 50 * GIGA  # bytes/s, report §3.2.2; DeepEP measures 50 and 51

H200_MEMORY = 141 * GIGA  # bytes, NVIDIA's data sheet
H200_NVLINK = 450 * GIGA  # bytes/s, half of the sheet's 900 for both ways; not a measurement

# DeepGEMM's README has 1009 to 1426 TFLOP/s on an H800 for shapes of this model, 0.51 to 0.72 of
# the peak. Attention reaches less, small products too: this is a guess within that range.
EFFICIENCY = 0.6

# Report, Table 1 and §1: what its own run took, in H800 hours.
REPORT_HOURS_PER_TRILLION = 180e3
REPORT_HOURS_PRETRAINING = 2664e3
REPORT_TOKENS = 14.8e12
REPORT_PARAMETERS = 671_026_419_200  # of the main model: to know that a plan is of the same one


class Hardware(NamedTuple):
    """A device and its links."""

    name: str
    bf16: float  # FLOP/s
    fp8: float
    efficiency: float  # of those that products reach
    memory: float  # bytes
    within_node: float  # bytes/s
    between_nodes: float


H800 = Hardware("H800", H800_BF16, H800_FP8, EFFICIENCY, H800_MEMORY, H800_NVLINK, H800_INFINIBAND)
H200 = Hardware("H200", H800_BF16, H800_FP8, EFFICIENCY, H200_MEMORY, H200_NVLINK, H800_INFINIBAND)
TABLE = {"h800": H800, "h200": H200}
