"""How the words of two session machines travel: as JSON objects with the name of the word and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from understudy.arbiter import Record
from understudy.errors import PeerError
from understudy.session.effects import Word
from understudy.session.events import Ended, Event, HoldsNothing, Joined, Prepare, Yield

__all__ = ["decode", "encode"]

_WORDS: Final[Mapping[str, type[Prepare | Joined | Ended | Yield | HoldsNothing]]] = {
    word.__name__: word for word in (Prepare, Joined, Ended, Yield, HoldsNothing)
}


def encode(word: Word) -> dict[str, Any]:
    """Return a word as a JSON-able object; `decode` is its inverse."""
    values: dict[str, Any] = {}
    for name in _WORDS[type(word).__name__].__match_args__:
        value = getattr(word, name)
        values[name] = value.to_json() if isinstance(value, Record) else value
    return {"word": type(word).__name__} | values


def decode(data: Mapping[str, Any]) -> Event:
    """Return the word that `encode` made an object of.

    Raises:
        PeerError: It is none.
    """
    kind = _WORDS.get(str(data.get("word")))
    if kind is None:
        raise PeerError(f"the other host sent {data.get('word')!r}, which is no word of a session")
    try:
        values = {name: data[name] for name in kind.__match_args__}
    except KeyError as missing:
        raise PeerError(f"the other host's word {kind.__name__} lacks {missing}") from missing
    if "record" in values:
        values["record"] = Record.from_json(values["record"])
    return kind(**values)
