"""The report's serving units (§3.4), simulated on the routing of a trained model.

    python -m benchmarks.placement --workdir runs/x [--other '/usr/include/linux/*.h'] [--out T.md]

The run's held-out documents, and then text of another kind, go through the model in batches; every
batch's loads, per layer and expert, are spread over the devices of a unit:

    prefill   E / 8 devices on 4 nodes, each with 8 of E experts and 1 redundant: hierarchical
    decode    5/4 E devices of one slot: E experts, and E / 4 that the redundant ones and replicas
              of the shared expert, a routed one that is always chosen, divide among them: global

With E = 256 these are the report's EP32 + 32 and EP320; a model with fewer experts gets the same
unit with fewer devices, and nodes as far as they divide. Given is the load of the heaviest device
over the mean, averaged over layers and batches (and the worst): what the others wait for. Columns:
experts in order without redundancy (in decode the shared expert has its E / 4 devices); a plan from
the moving average of all batches before, as one serves; a plan from the batch itself, the bound.
The batch after a change of text is a row of its own: its plan knows only the text before.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3.checkpoint.trained import Trained, from_workdir
from dsv3.cli import Parser
from dsv3.config import Data
from dsv3.data.corpus import Corpus
from dsv3.errors import DataError, UserError, exits_cleanly
from dsv3.evaluation.bits_per_byte import held_out
from dsv3.files import write_atomically
from dsv3.inference.placement import Placement, device_loads, imbalance, placement_of
from dsv3.inference.replicas import Balancer, routed_loads


class Unit(NamedTuple):
    name: str
    balancer: Balancer
    before: Placement
    shared: bool  # the shared expert is one more, that every token goes through

    def loads(self, counts_LE: np.ndarray, chosen: int) -> np.ndarray:
        if not self.shared:
            return counts_LE
        return np.concatenate([counts_LE, counts_LE.sum(1, keepdims=True) // chosen], axis=1)

    def imbalance(self, load_LE: np.ndarray, placement: Placement) -> np.ndarray:
        return imbalance(device_loads(load_LE, placement, self.balancer.devices))


def units(experts: int, groups: int, layers: int, keep: float) -> list[Unit]:
    """The two units for a model with `experts`. Raises UserError where 8 does not divide them."""
    if experts % 8:
        raise UserError(f"{experts} experts: the units have 8 a device, so 8 must divide them")
    devices, extra = experts // 8, experts // 4
    nodes = math.gcd(4, devices, groups)
    in_order = np.tile(np.arange(experts), (layers, 1))
    with_shared = np.concatenate([in_order, np.full((layers, extra), experts)], axis=1)
    prefill = Balancer(experts + devices, devices, groups, nodes, keep)
    decode = Balancer(experts + extra, experts + extra, keep=keep)
    return [
        Unit(f"prefill: {devices} devices on {nodes} nodes, {prefill.slots} slots", prefill,
             placement_of(in_order, experts), shared=False),
        Unit(f"decode: {decode.devices} devices of one slot", decode,
             placement_of(with_shared, experts + 1), shared=True),
    ]  # fmt: skip


def batches(
    trained: Trained, texts: Sequence[str], tokens: int, most: int
) -> Iterator[list[list[int]]]:
    """At most `most` batches of `tokens` tokens of text, in sequences of the trained length."""
    tokenizer, length = trained.tokenizer(), trained.config.training.sequence_length
    stream = [id for ids in tokenizer.encode_batch(texts) for id in (tokenizer.eos, *ids.tolist())]
    sequences = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    rows = max(1, tokens // length)
    for first in range(0, min(len(sequences) - rows + 1, most * rows), rows):
        yield sequences[first : first + rows]


def simulate(trained: Trained, kinds: dict[str, list[str]], tokens: int, most: int, keep: float):
    """(unit, kind of batch) → [batches, layers, 3] imbalances; seconds a plan took, in the mean."""
    moe = trained.config.model.moe
    rows = trained.config.model.moe_layers + trained.config.model.mtp_depths
    found, seconds = defaultdict(list), []
    every_unit = units(moe.routed_experts, moe.groups, rows, keep)
    for kind, texts in kinds.items():
        for number, batch in enumerate(batches(trained, texts, tokens, most)):
            counts_LE = routed_loads(trained.model, batch)
            for unit in every_unit:
                load_LE = unit.loads(counts_LE, moe.experts_per_token)
                if unit.balancer.load_LE is not None:
                    started = time.perf_counter()
                    planned = unit.balancer.plan()
                    seconds.append(time.perf_counter() - started)
                    alone = Balancer(**{name: getattr(unit.balancer, name) for name in
                                        ("slots", "devices", "groups", "nodes")})  # fmt: skip
                    alone.observe(load_LE)
                    plans = unit.before, planned, alone.plan()
                    which = f"{kind}, the first batch" if number == 0 else kind
                    found[unit.name, which].append([unit.imbalance(load_LE, p) for p in plans])
                unit.balancer.observe(load_LE)
    return {key: np.array(rows).transpose(0, 2, 1) for key, rows in found.items()}, seconds


def table(found: dict[tuple[str, str], np.ndarray]) -> Iterator[str]:
    yield "| unit | text | batches | no redundancy | planned before | planned on it |"
    yield "|---|---|---|---|---|---|"
    for (unit, kind), values in found.items():
        cells = [f"{m:.2f} ({w:.2f})" for m, w in
                 zip(values.mean((0, 1)), values.max((0, 1)), strict=True)]  # fmt: skip
        yield f"| {unit} | {kind} | {len(values)} | {' | '.join(cells)} |"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="of a run with experts")
    parser.add_argument(
        "--other", metavar="CORPUS", help="text of another kind: file, folder, glob"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch")
    parser.add_argument("--batches", type=int, default=12, help="of each kind of text, at most")
    parser.add_argument("--keep", type=float, default=0.9, help="of the average, a batch")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    options = parser.parse_args(arguments)
    trained = from_workdir(options.workdir, print)
    kinds = {"held out": [document.text for document in held_out(trained.config.data)]}
    if options.other:
        data = Data(corpus=options.other, max_bytes=8 * options.tokens * options.batches)
        kinds["other"] = [document.text for document in Corpus(data).documents()]
    found, seconds = simulate(trained, kinds, options.tokens, options.batches, options.keep)
    if not found:
        raise DataError(f"the text fills fewer than two batches of {options.tokens} tokens")
    lines = "\n".join(table(found))
    print(f"{lines}\n\na plan takes {np.mean(seconds):.3f} s")
    if options.out:
        write_atomically(options.out, lines + "\n")


if __name__ == "__main__":
    main()
