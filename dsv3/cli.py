"""What the command lines have in common."""

import argparse

from dsv3.bindings import Binding, parse
from dsv3.errors import ConfigError, UserError


class Parser(argparse.ArgumentParser):
    """Usage from a module's docstring; complains in one line, as everything else does."""

    def __init__(self, doc: str | None = None, **options):
        if doc is not None:
            summary, _, usage = doc.partition("\n")
            options |= {"description": summary, "epilog": usage}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_bindings(self) -> None:
        """`--set PATH=VALUE`, any number of times: a list of Binding, `set` of the options."""
        self.add_argument(
            "--set", action="extend", type=_bindings, default=[], metavar="PATH=VALUE",
            help="bind a field of the configuration; may be given several times",
        )  # fmt: skip

    def add_processes(self) -> None:
        """What `launch.place_of` and `launch.run` want to know."""
        several = self.add_argument_group("several processes, where no launcher tells")
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--processes", type=int, metavar="N", help="1: there is no other")
        several.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
        several.add_argument(
            "--join-seconds", type=int, default=300, metavar="S", help="how long all are waited for"
        )

    def error(self, message: str):
        raise UserError(message)


def _bindings(text: str) -> list[Binding]:
    found = parse(text)
    if not found:
        raise ConfigError(f"--set {text!r} binds nothing; it wants PATH=VALUE")
    return found
