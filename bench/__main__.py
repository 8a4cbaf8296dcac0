"""Run all benchmarks, or those named: ``python -m bench [NAME …]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import flat, table

if TYPE_CHECKING:
    from bench.figures import Figure

# In this order: the cheap ones first, those that keep both cores busy last.
NAMES = (
    "commands",
    "phases",
    "barrier",
    "thin",
    "xen_stream",
    "agents",
    "overhead",
    "pause",
    "remus",
    "remus_pause",
    "remus_overload",
    "drbd_takeover",
    "takeover",
    "xen_remus",
)


def main(argv: list[str]) -> int:
    """Run the benchmarks named in `argv`, print the table, write the file."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="where the figures go")
    chosen = parser.parse_args(argv)
    unknown = sorted(set(chosen.names) - set(NAMES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    figures: list[Figure] = []
    for name in chosen.names or NAMES:
        print(f"… {name}", file=sys.stderr, flush=True)
        figures += importlib.import_module(f"bench.{name}").measure()
    chosen.output.write_text(json.dumps(flat(figures), indent=2) + "\n")
    print(table(figures))
    print(f"written to {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
