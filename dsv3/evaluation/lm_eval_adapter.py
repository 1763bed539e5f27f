"""A model of ours under lm-evaluation-harness, whose tasks then run unchanged.

    pip install 'dsv3[lm-eval]'
    python eval.py lm-eval --workdir runs/tiny --tasks arc_easy,hellaswag --out results.json
    python eval.py lm-eval --workdir runs/tiny --tasks mine --include-path folder/with/mine.yaml

This is the one file that imports `lm_eval`, and nothing imports this one but `eval.py lm-eval`.
What it does with strings is `evaluation.strings`, the same conventions as for our own tasks.
"""

from collections.abc import Sequence
from typing import Any

from dsv3.errors import DataError, UserError
from dsv3.evaluation.harness import Reader
from dsv3.evaluation.strings import completions, loglikelihoods, rolling

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise DataError(
        f"lm-eval is not here ({error}); install it with: pip install 'dsv3[lm-eval]'"
    ) from error


class Dsv3LM(LM):
    """`lm_eval.simple_evaluate(model=Dsv3LM(reader), ...)`."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return loglikelihoods(self.reader, [request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return rolling(self.reader, [request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return completions(self.reader, [request.args for request in requests])


def run(
    reader: Reader,
    tasks: Sequence[str],
    include_path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What the harness reports for its `tasks`, as JSON holds it. Raises UserError for a task that
    it does not know, naming it."""
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(f"lm-eval has no task {', '.join(unknown)}; --include-path adds yours")
    found = lm_eval.simple_evaluate(
        model=Dsv3LM(reader), tasks=list(tasks), task_manager=manager, num_fewshot=shots,
        limit=limit, bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    return {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}
