"""What a run measures, on disk: `metrics.jsonl`, the loads of its experts, TensorBoard.

Reading a device value waits for the step that makes it. So the recorder reads late: it is handed
the metrics of step n once that step is dispatched, and only then reads those of step n - 1, while
the device is busy with n. Before a checkpoint, and at the end, `flush` reads what is left; thereby
a run killed at any moment and resumed has every line once.

    metrics.jsonl   an object a logged step: the scalars, and `fp8` (see `reporting.fp8`) if asked
    loads.jsonl     the same for {"step": n, "load": [L, E]}, the tokens that each expert was given
    tensorboard/    the scalars again

Logged are step 1, every `reporting.every`-th step, the one that ends the run, any with a value that
is not finite, and those at which FP8 was watched.
The step is the one that the state counts, so a refused step repeats the number of the last taken.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3.config import Reporting
from dsv3.errors import DataError
from dsv3.reporting.fp8 import described
from dsv3.reporting.lines import append, cut_back, encoded, is_finite, read_rows

METRICS, LOADS = "metrics.jsonl", "loads.jsonl"


class Recorder:
    """Records the metrics of a run that starts, or goes on, after `step`; reads them only, where
    `workdir` is None, as another process writes them.

    `sequences` of `sequence_length` tokens were consumed and `skipped` steps refused by then. Lines
    of an earlier attempt that lie beyond are dropped, and so is a torn last line.
    """

    def __init__(
        self,
        workdir: str | Path | None,
        reporting: Reporting,
        sequence_length: int,
        *,
        step: int = 0,
        sequences: int = 0,
        skipped: int = 0,
    ):
        self._every = reporting.every
        self._length = sequence_length
        self._pending: Mapping[str, Any] | None = None
        self._rate_from = (sequences * sequence_length, time.perf_counter())
        self._writes, self._events = workdir is not None, None
        if workdir is None:
            return
        self._metrics, self._loads = Path(workdir) / METRICS, Path(workdir) / LOADS
        cut_back(self._metrics, {"step": step, "skipped": skipped})
        cut_back(self._loads, {"step": step})
        self._metrics.touch()
        if reporting.tensorboard:
            from dsv3.reporting.tensorboard import EventFile  # costs most of a second to import

            self._events = EventFile(Path(workdir) / "tensorboard", step + 1)

    def record(self, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take the metrics of a step just dispatched; return those of the step before.

        Metrics are scalars or small arrays, on the device or not, `step` among them; `load` [L, E]
        counts the tokens of each expert, `fp8` is what `reporting.fp8` measured, and any other
        array counts as scalars `name/index`. Returned are Python numbers under the same names;
        where there is `sequences`, `tokens` stands instead and `tokens_per_second` since the last
        logged step (or the start of the run, so that compilation counts in its first). None where
        nothing waits.
        """
        late = self.flush()
        for value in jax.tree.leaves(dict(metrics)):
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending = metrics
        return late

    def flush(self, last: bool = False) -> dict[str, Any] | None:
        """Read and write what waits: before a checkpoint, and at the end, after the `last` step."""
        if self._pending is None:
            return None
        metrics, self._pending = self._pending, None
        host = jax.tree.map(np.asarray, jax.device_get(dict(metrics)))
        load, fp8 = host.pop("load", None), host.pop("fp8", None)
        row = {"step": host["step"].item(), **_scalars(host)}
        now = time.perf_counter()
        if "sequences" in row:
            row["tokens"] = row.pop("sequences") * self._length
            tokens, then = self._rate_from
            row["tokens_per_second"] = (row["tokens"] - tokens) / (now - then)
        finite = all(map(is_finite, row.values()))
        if row["step"] == 1 or row["step"] % self._every == 0 or last or not finite or fp8:
            self._rate_from = (row.get("tokens", 0), now)
            if self._writes:
                self._log(row, load if finite else None, fp8)
        return row

    def _log(self, row: dict[str, Any], load: np.ndarray | None, fp8: Mapping | None) -> None:
        append(self._metrics, encoded(row | {"fp8": described(fp8)} if fp8 else row))
        if load is not None:
            append(self._loads, encoded({"step": row["step"], "load": load.tolist()}))
        if self._events:
            self._events.scalars(row["step"], {k: v for k, v in row.items() if k != "step"})


def _scalars(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "/".join([name, *map(str, index)]): value.item()
        for name, array in arrays.items()
        if name != "step"
        for index, value in np.ndenumerate(array)
    }


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run, oldest first. Raises DataError where there is no run."""
    path = Path(workdir) / METRICS
    if not path.is_file():
        raise DataError(f"no {METRICS} in {workdir}: it is no run's workdir")
    return read_rows(path)


def read_loads(workdir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Logged steps int64 [n] and the tokens that each expert then got, float64 [n, L, E].

    All empty where the model has no MoE layers.
    """
    path = Path(workdir) / LOADS
    rows = read_rows(path) if path.is_file() else []
    steps = np.array([row["step"] for row in rows], np.int64)
    loads = np.array([row["load"] for row in rows], np.float64)
    return steps, loads.reshape(len(rows), *(loads.shape[1:] if loads.size else (0, 0)))
