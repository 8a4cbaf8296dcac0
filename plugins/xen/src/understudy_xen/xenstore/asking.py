"""What can be asked of xenstore, written once for the client of asyncio and the one that blocks.

A `Request` says what is sent and how its answer is read; who sends it, and how it waits, is the client's part.

Source: Xen docs/misc/xenstore.txt (4.22.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from understudy_xen.xenstore.errors import XenStoreGarbage, XenStoreLimit
from understudy_xen.xenstore.wire import Op, path_bytes, special_or_path_bytes, strings, text_of

__all__ = ["Access", "Permission", "Request"]

T_co = TypeVar("T_co", covariant=True)


class Access(Enum):
    """What a domain may do with a node, by the letter that the protocol has for it."""

    NONE = "n"
    READ = "r"
    WRITE = "w"
    BOTH = "b"


@dataclass(frozen=True, slots=True)
class Permission:
    """One entry of a node's permissions.

    The first one of a node names its owner, and what all domains without an entry of their own may do.
    """

    domid: int
    access: Access

    def __str__(self) -> str:
        return f"{self.access.value}{self.domid}"

    @classmethod
    def parse(cls, text: str) -> Permission:
        """Return the entry that the protocol's word stands for, e.g. ``"b3"``."""
        try:
            return cls(int(text[1:]), Access(text[:1]))
        except ValueError:
            raise XenStoreGarbage(f"xenstored told a permission that is none: {text!r}") from None


@dataclass(frozen=True, slots=True)
class Request(Generic[T_co]):
    """One request, not yet sent."""

    op: Op
    payload: bytes
    what: str  #: for errors: type and path
    parse: Callable[[bytes], T_co]


def _nothing(_answer: bytes) -> None:
    return None


def _flag(answer: bytes) -> bool:
    return answer.startswith(b"T")


def _names(answer: bytes) -> list[str]:
    return [text_of(name) for name in strings(answer)]


def _first(answer: bytes) -> str:
    return text_of(answer.split(b"\0", 1)[0])


def _number(answer: bytes) -> int:
    try:
        return int(_first(answer))
    except ValueError:
        raise XenStoreGarbage(f"xenstored began a transaction with the number {answer!r}") from None


def _part(answer: bytes) -> tuple[str, bytes]:
    generation, _, rest = answer.partition(b"\0")
    return text_of(generation), rest


def read(path: str) -> Request[str]:
    """Ask for a value."""
    return Request(Op.READ, path_bytes(path) + b"\0", f"READ {path}", text_of)


def write(path: str, value: str) -> Request[None]:
    """Ask to store a value; missing parents are made."""
    raw = value.encode("utf-8", "surrogateescape")
    return Request(Op.WRITE, path_bytes(path) + b"\0" + raw, f"WRITE {path}", _nothing)


def mkdir(path: str) -> Request[None]:
    """Ask that a path exists."""
    return Request(Op.MKDIR, path_bytes(path) + b"\0", f"MKDIR {path}", _nothing)


def rm(path: str) -> Request[None]:
    """Ask that a path does not exist, nor anything below."""
    if path == "/":
        raise XenStoreLimit("the root of xenstore is never removed")
    return Request(Op.RM, path_bytes(path) + b"\0", f"RM {path}", _nothing)


def directory(path: str) -> Request[list[str]]:
    """Ask for the names below a path; refused with E2BIG where they do not fit into one answer."""
    return Request(Op.DIRECTORY, path_bytes(path) + b"\0", f"DIRECTORY {path}", _names)


def directory_part(path: str, offset: int) -> Request[tuple[str, bytes]]:
    """Ask for the list of names from a byte on; answered by the node's generation and a part of the list."""
    payload = path_bytes(path) + b"\0%d\0" % offset
    return Request(Op.DIRECTORY_PART, payload, f"DIRECTORY_PART {path}", _part)


def get_perms(path: str) -> Request[list[Permission]]:
    """Ask for a node's permissions."""
    return Request(
        Op.GET_PERMS,
        path_bytes(path) + b"\0",
        f"GET_PERMS {path}",
        lambda answer: [Permission.parse(word) for word in _names(answer)],
    )


def set_perms(path: str, permissions: Iterable[Permission]) -> Request[None]:
    """Ask to replace a node's permissions; the first one names the owner."""
    words = [str(permission) for permission in permissions]
    if not words:
        raise XenStoreLimit(f"{path}: a node has at least one permission, its owner's")
    payload = path_bytes(path) + b"\0" + b"".join(word.encode() + b"\0" for word in words)
    return Request(Op.SET_PERMS, payload, f"SET_PERMS {path}", _nothing)


def watch(path: str, token: str) -> Request[None]:
    """Ask to be told of each change at a path or below it."""
    payload = special_or_path_bytes(path) + b"\0" + token.encode() + b"\0"
    return Request(Op.WATCH, payload, f"WATCH {path}", _nothing)


def unwatch(path: str, token: str) -> Request[None]:
    """Ask not to be told any more."""
    payload = special_or_path_bytes(path) + b"\0" + token.encode() + b"\0"
    return Request(Op.UNWATCH, payload, f"UNWATCH {path}", _nothing)


def transaction_start() -> Request[int]:
    """Ask for a transaction's number."""
    return Request(Op.TRANSACTION_START, b"\0", "TRANSACTION_START", _number)


def transaction_end(*, commit: bool) -> Request[None]:
    """Ask to commit or to discard a transaction."""
    return Request(Op.TRANSACTION_END, b"T\0" if commit else b"F\0", "TRANSACTION_END", _nothing)


def is_domain_introduced(domid: int) -> Request[bool]:
    """Ask whether xenstored talks to a domain."""
    return Request(Op.IS_DOMAIN_INTRODUCED, b"%d\0" % domid, f"IS_DOMAIN_INTRODUCED {domid}", _flag)


def get_domain_path(domid: int) -> Request[str]:
    """Ask where a domain's own part of the store begins."""
    return Request(Op.GET_DOMAIN_PATH, b"%d\0" % domid, f"GET_DOMAIN_PATH {domid}", _first)


def resume(domid: int) -> Request[None]:
    """Ask that ``@releaseDomain`` is told again when the domain shuts down."""
    return Request(Op.RESUME, b"%d\0" % domid, f"RESUME {domid}", _nothing)
