"""Several processes as one program: what each knows of the others.

Devices talk through XLA's collectives; here the hosts do, through the key-value store of
`jax.distributed`, which works while no device does, and knows who has died. All processes run the
same code, so all of them reach each call here, in the same order.

What one process meets, all must meet: `together` makes the error of one the error of all, where
otherwise the others would wait for it. A process that dies is noticed by the runtime.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

from dsv3.bindings import literal
from dsv3.errors import ConfigError, UserError

OF_A_HOST = ("data.cache", "data.corpus")  # where it keeps what all have alike
WAIT_SECONDS = 3600  # longer than any process may take on its own: the dead are found before
SLICE_SECONDS = 1  # a signal is heard between two waits, not within
_rounds = itertools.count()
_LAG = 64  # calls of an agreement that a process may be behind; collectives allow it a few


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


def exchange(text: str) -> list[str]:
    """What every process passed, by its index. Returns once all have called it.

    The first gathers and passes on: three messages a process, however many there are.
    """
    if jax.process_count() == 1:
        return [text]
    store: Any = distributed.global_state.client
    me, turn = jax.process_index(), next(_rounds)
    if not is_first():
        store.key_value_set(f"dsv3/{turn}/{me}", text)
        return json.loads(_heard(f"dsv3/{turn}/all"))
    said = [text, *(_heard(f"dsv3/{turn}/{i}") for i in range(1, jax.process_count()))]
    store.key_value_set(f"dsv3/{turn}/all", json.dumps(said))
    if turn:  # whoever has spoken this round has read the one before
        store.key_value_delete(f"dsv3/{turn - 1}")  # and all below
    return said


def _heard(key: str) -> str:
    """What is stored as `key`, once it is."""
    store: Any = distributed.global_state.client
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return store.blocking_key_value_get(key, SLICE_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > end:
                raise


def require_same(asked: Mapping[str, Any]) -> None:
    """Raise ConfigError in all processes where one was asked for other values than the first.

    Each would compile its own, and what they sum over devices would belong to none of them. What is
    OF_A_HOST may differ.
    """
    texts = {name: literal(value) for name, value in asked.items() if name not in OF_A_HOST}
    first, *others = map(json.loads, exchange(json.dumps(texts)))
    for process, other in enumerate(others, 1):
        here, there = (dict.fromkeys(first | other, "absent") | some for some in (first, other))
        unlike = [
            f"{name} is {here[name]} in process 0 and {there[name]} in process {process}"
            for name in here
            if here[name] != there[name]
        ]
        if unlike:
            raise ConfigError("; ".join(unlike[:4]))


@contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Leave the block in all processes at once, each with an exception where any has one.

    The others raise the same as the process that failed, if that is one of `kinds`, else a
    UserError that names it. Within the block nothing of this module is called.
    """
    try:
        yield
    except Exception as error:
        exchange(json.dumps([type(error).__name__, str(error)]))
        raise
    for process, said in enumerate(exchange("")):
        if said:
            name, message = json.loads(said)
            for kind in kinds:
                if kind.__name__ == name:
                    raise kind(message)
            raise UserError(f"process {process}: {message or name}")


def compiled_together(function: Any) -> Callable:
    """The jitted `function`, which all processes compile before any runs it.

    One that runs ahead waits in its first collective for the others: half a minute at most on the
    CPU, where gloo then gives up, and compilers may take longer than that on a busy machine.
    """
    if jax.process_count() == 1:
        return function
    ready: dict[Any, Callable] = {}

    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        kind = (structure, *((x.shape, x.dtype) for x in leaves))
        if kind not in ready:
            with together():
                ready[kind] = function.lower(*args).compile()
        return ready[kind](*args)

    return run


class Agreement:
    """What any process wants, heard by all at the same call.

    Every process calls it at the same moments of the same work, a step of training for instance, in
    which they also wait for each other. The first is told what others want and says what holds, and
    the others wait for that: one message each, and no device.
    """

    def __init__(self):
        self._calls = itertools.count()
        self._name = f"dsv3/agreement/{next(_rounds)}"
        self._told = False

    def __call__(self, wish: str | None) -> str | None:
        """`wish` or that of another process, made at an earlier call or this one."""
        if jax.process_count() == 1:
            return wish
        store: Any = distributed.global_state.client
        call = next(self._calls)
        if wish and not self._told:
            store.key_value_set(f"{self._name}/wish", wish, allow_overwrite=True)
            self._told = True
        if is_first():
            wishes = dict(store.key_value_dir_get(self._name))
            heard = json.dumps(wishes.get(f"{self._name}/wish"))
            store.key_value_set(f"{self._name}-{call}", heard)
            if call >= _LAG:
                store.key_value_delete(f"{self._name}-{call - _LAG}")
        return json.loads(_heard(f"{self._name}-{call}"))
