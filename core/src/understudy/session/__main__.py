"""Print the session tables as Markdown, or write them into the page of the documentation that shows them."""

from __future__ import annotations

import sys
from pathlib import Path

from understudy.session import TABLES
from understudy.session.diagram import draw, insert


def main(arguments: list[str]) -> int:
    """Print the diagrams; with ``--write [PAGE]`` put them into the page (docs/explanation/session.md)."""
    if not arguments:
        sys.stdout.write(draw(TABLES))
        return 0
    if arguments[0] != "--write":
        sys.stderr.write("usage: python -m understudy.session [--write [PAGE]]\n")
        return 2
    page = Path(arguments[1] if len(arguments) > 1 else "docs/explanation/session.md")
    page.write_text(insert(page.read_text(), TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
