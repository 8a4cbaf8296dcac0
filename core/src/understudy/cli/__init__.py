"""The command line: thin, quick to start; everything that takes time to import is imported by who needs it."""

from __future__ import annotations

import sys

from understudy._version import __version__

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    # Asked by scripts often enough to answer before anything is imported.
    if sys.argv[1:] == ["--version"]:
        print(f"understudy {__version__}")  # noqa: T201 - that is the answer
        return
    from understudy.cli.program import program  # noqa: PLC0415 - see above

    program(prog_name="understudy")
