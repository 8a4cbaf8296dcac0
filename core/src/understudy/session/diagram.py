"""The session tables as pictures and lists for the documentation, drawn from the tables themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from understudy.device import ReplicationMode
from understudy.session.machine import Branch, State, Table, Tables

__all__ = ["BEGIN", "END", "draw", "insert"]

BEGIN: Final = "<!-- begin: drawn by `python -m understudy.session --write`, do not edit -->"
END: Final = "<!-- end -->"


def draw(tables: Tables) -> str:
    """Return both machines as Markdown: for each a Mermaid diagram, then every row that does something."""
    parts: list[str] = []
    for side in ReplicationMode:
        table = tables.of(side)
        parts += [f"### The {side.value}", "", *_diagram(table), "", *_rows(table), ""]
    return "\n".join(parts)


def insert(page: str, tables: Tables) -> str:
    """Return `page` with what lies between `BEGIN` and `END` drawn anew.

    Raises:
        ValueError: The page does not have both marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError("the page has no place for the diagrams")
    return f"{head}{BEGIN}\n\n{draw(tables)}\n{END}{tail}"


def _diagram(table: Table) -> Iterator[str]:
    # Only arrows between different states; the list below has the rest.
    arrows: dict[tuple[State, State], dict[str, None]] = {}
    for state, event, branch in _branches(table):
        if branch.to is not None and branch.to is not state:
            arrows.setdefault((state, branch.to), {})[event] = None
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {next(iter(table)).value}"
    for (state, to), events in arrows.items():
        yield f"    {state.value} --> {to.value}: {', '.join(events)}"
    yield "```"


def _rows(table: Table) -> Iterator[str]:
    yield "| in | on | if | do, in this order | then |"
    yield "|---|---|---|---|---|"
    for state, event, branch in _branches(table):
        if not branch.do and branch.to in {None, state}:
            continue
        condition = _sentence(branch.when) if branch.when is not None else ""
        actions = ", ".join(_name(action) for action in branch.do)
        to = state if branch.to is None else branch.to
        yield f"| {state.value} | {event} | {condition} | {actions} | {'' if to is state else to.value} |"


def _branches(table: Table) -> Iterator[tuple[State, str, Branch]]:
    for state, row in table.items():
        for event, branches in row.items():
            for branch in branches:
                yield state, event.__name__, branch


def _name(thing: object) -> str:
    return str(getattr(thing, "__name__", "?")).replace("_", " ")


def _sentence(thing: object) -> str:
    return (thing.__doc__ or _name(thing)).strip().splitlines()[0].rstrip(".").replace("``", "`")
