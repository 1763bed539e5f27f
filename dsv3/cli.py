"""What the command lines have in common."""

import argparse

from dsv3.errors import UserError


class Parser(argparse.ArgumentParser):
    """Usage from a module's docstring; complains in one line, as everything else does."""

    def __init__(self, doc: str | None = None, **options):
        if doc is not None:
            summary, _, usage = doc.partition("\n")
            options |= {"description": summary, "epilog": usage}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(message)
