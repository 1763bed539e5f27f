"""Time our training step, and the compilation in front of it.

    python -m benchmarks.step configs/bench_cpu.py
    python -m benchmarks.step configs/bench_cpu.py --set training.compute_dtype=bfloat16

The jitted step of a configuration (forward, loss, backward, clip, AdamW, router bias, guard) on
fresh uniformly random tokens, its end awaited each time. Prints one JSON line: the median seconds
of a step, all the steps, the seconds of the first call, which compiles, and what ran.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.config import Config
from dsv3.errors import exits_cleanly
from dsv3.host import keep_freed_memory
from dsv3.parallel import mesh as meshes
from dsv3.sweeps import load_config
from dsv3.training import state as train_state
from dsv3.training.schedules import batch_size
from dsv3.training.step import make_step


def measure(config: Config, steps: int, warmup: int) -> tuple[list[float], float]:
    """Seconds of each of `steps` steps after `warmup` untimed ones, and of the very first call."""
    mesh = meshes.build(config.parallel)
    step, state = make_step(config, mesh), train_state.create(config, mesh)
    shape = (batch_size(config.training, 0), config.training.sequence_length + 1)
    draw = np.random.default_rng(0)
    seconds = []
    for _ in range(1 + warmup + steps):
        tokens_BS = jnp.asarray(draw.integers(config.model.vocab, size=shape, dtype=np.int32))
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, tokens_BS))
        seconds.append(time.perf_counter() - start)
    if int(metrics["skipped"]):
        raise RuntimeError(f"the guard refused {int(metrics['skipped'])} steps")
    return seconds[1 + warmup :], seconds[0]


@exits_cleanly
def main() -> None:
    keep_freed_memory()
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_bindings()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    config = apply(load_config(args.config), args.set)
    seconds, first = measure(config, args.steps, args.warmup)
    report = {
        "what": f"dsv3, jax {jax.__version__} on {jax.default_backend()}",
        "precision": config.training.compute_dtype,
        "median_s": round(statistics.median(seconds), 4),
        "first_s": round(first, 2),
        "seconds": [round(s, 4) for s in seconds],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
