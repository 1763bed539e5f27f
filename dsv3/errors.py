"""Errors that are the user's to mend, and how an entry point ends on one.

Everything a user can get wrong (a binding, a file, a checkpoint, a full disk) is raised as a
`UserError` whose message is one line naming the field, file or value, with the nearest right
one where there is any. Entry points run under `exits_cleanly`, which prints that line to
stderr and exits with code 2. Any other exception is a bug of ours and keeps its traceback.
"""

import difflib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable

LISTED = 12  # names, at most, in a message


class UserError(Exception):
    """Bad input. The message is a single line that names the thing and what to do."""


class ConfigError(UserError):
    """A configuration, binding or sweep that cannot be."""


class DataError(UserError):
    """A corpus, tokenizer or shard that is missing, empty, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, foreign or does not fit the configuration."""


class MisfitError(CheckpointError):
    """A sound checkpoint of other arrays; `extra` is what was saved with them."""

    def __init__(self, message: str, extra: dict):
        super().__init__(message)
        self.extra = extra


class TrainingError(UserError):
    """A run that had to end: too many non-finite steps in a row."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' for the closest valid name, else '; valid: A, B, C', at most `LISTED`."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; valid: {', '.join([*names[:LISTED], *more])}"
    )


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap an entry point: a `UserError`, and what the system refuses, print a line and exit 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            message = " ".join(str(error).split())
        except BrokenPipeError:  # the reader, `head` perhaps, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        except OSError as error:
            if error.errno is None:  # raised by a library, not by the system
                raise
            message = f"{error.strerror}: {error.filename or 'while writing'}"
        except KeyboardInterrupt as interruption:
            print(": ".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        else:
            return
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped
