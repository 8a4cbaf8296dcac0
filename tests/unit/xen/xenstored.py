"""A xenstored in memory, for what has to be seen in the store; its words are compared with a real one's."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tests.unit.xen.xenstore_exchange import as_bytes
from understudy_xen.xenstore.wire import PAYLOAD_MAX, Decoder, Message, Op, strings

OK: Final = b"OK\0"
_LIST_BYTES: Final = PAYLOAD_MAX - 16


class _Refused(Exception):
    pass


@dataclass
class _Tree:
    values: dict[str, bytes]
    perms: dict[str, bytes] = field(default_factory=dict)

    def copy(self) -> _Tree:
        return _Tree(dict(self.values), dict(self.perms))

    def has(self, path: str) -> bool:
        return path in self.values

    def make(self, path: str, value: bytes | None) -> None:
        names = path.strip("/").split("/")
        for depth in range(1, len(names)):
            self.values.setdefault("/" + "/".join(names[:depth]), b"")
        if value is None:
            self.values.setdefault(path, b"")
        else:
            self.values[path] = value

    def need(self, path: str) -> None:
        if path not in self.values:
            raise _Refused("ENOENT")

    def remove(self, path: str) -> None:
        if not self.has(path):
            self.need(path.rpartition("/")[0])
        for each in [each for each in self.values if f"{each}/".startswith(f"{path}/")]:
            del self.values[each]

    def names(self, path: str) -> list[bytes]:
        self.need(path)
        below = [each[len(path) + 1 :] for each in self.values if each.startswith(f"{path}/")]
        return sorted(name.encode() for name in below if "/" not in name)


@dataclass
class _Transaction:
    tree: _Tree
    began: int
    touched: set[str] = field(default_factory=set)
    done: list[tuple[Op, str, bytes]] = field(default_factory=list)


class Xenstored:
    """Serves one tree on a socket, to any number of clients, each in a thread.

    Args:
        place: Where.
        values: What is there from the start.
    """

    def __init__(self, place: Path, values: dict[str, str] | None = None) -> None:
        self.place = place
        self._tree = _Tree({"/local/domain/0/name": b"Domain-0"})
        for path, value in (values or {}).items():
            self._tree.make(path, value.encode())
        self._changes: list[str] = []
        self._transactions: dict[int, _Transaction] = {}
        self._last_tx = 0
        self._watches: list[tuple[socket.socket, bytes, bytes]] = []
        self._clients: list[socket.socket] = []
        self._lock = threading.RLock()
        self._closed = False
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(place))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._closed = True
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            for each in (self._server, *self._clients):
                each.close()

    def __getitem__(self, path: str) -> str:
        with self._lock:
            return self._tree.values[path].decode()

    def __setitem__(self, path: str, value: str) -> None:
        with self._lock:
            self._change(Op.WRITE, path, value.encode())

    def __contains__(self, path: str) -> bool:
        with self._lock:
            return self._tree.has(path)

    def hang_up(self) -> None:
        """Close all connections; who connects anew is served."""
        with self._lock:
            for client in self._clients:
                client.shutdown(socket.SHUT_RDWR)

    def tell(self, special: str) -> None:
        """Have a special watch fire, such as ``@releaseDomain``."""
        with self._lock:
            self._fire(special)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                if self._closed:  # it came in the last moment
                    client.close()
                    return
                self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        decoder = Decoder()
        try:
            while data := client.recv(65536):
                for message in decoder.feed(data):
                    with self._lock:
                        self._answer(client, message)
        except OSError:
            pass
        with self._lock:
            self._watches = [each for each in self._watches if each[0] is not client]
            if client in self._clients:
                self._clients.remove(client)
            client.close()

    def _answer(self, client: socket.socket, asked: Message) -> None:
        op, payload = asked.op, b""
        try:
            payload = self._carry_out(client, Op(op), asked)
        except _Refused as refused:
            op, payload = Op.ERROR, str(refused).encode() + b"\0"
        client.sendall(as_bytes(Message(op, asked.req_id, asked.tx_id, payload)))
        if asked.op == Op.WATCH:  # told of at once, after the answer
            path, token = strings(asked.payload)
            client.sendall(as_bytes(Message(Op.WATCH_EVENT, 0, 0, path + b"\0" + token + b"\0")))

    def _carry_out(self, client: socket.socket, op: Op, asked: Message) -> bytes:  # noqa: C901, PLR0911, PLR0912 - a table
        first, _, rest = asked.payload.partition(b"\0")
        path = first.decode()
        transaction = self._transactions.get(asked.tx_id)
        tree = transaction.tree if transaction else self._tree
        if transaction is not None and op is not Op.TRANSACTION_END:
            transaction.touched.add(path)
        match op:
            case Op.READ:
                tree.need(path)
                return tree.values[path]
            case Op.DIRECTORY:
                found = b"".join(name + b"\0" for name in tree.names(path))
                if len(found) > PAYLOAD_MAX:
                    raise _Refused("E2BIG")
                return found
            case Op.DIRECTORY_PART:
                whole = b"".join(name + b"\0" for name in tree.names(path)) + b"\0"
                part = whole[int(strings(rest)[0]) :]
                if len(part) > _LIST_BYTES:
                    part = part[: part.rindex(b"\0", 0, _LIST_BYTES) + 1]
                return b"%d\0" % len(self._changes) + part
            case Op.GET_PERMS:
                tree.need(path)
                return tree.perms.get(path, b"n0\0")
            case Op.SET_PERMS:
                tree.need(path)
                tree.perms[path] = rest
                return OK
            case Op.WRITE | Op.MKDIR | Op.RM:
                if transaction is None:
                    self._change(op, path, rest)
                else:
                    _apply(tree, op, path, rest)
                    transaction.done.append((op, path, rest))
                return OK
            case Op.WATCH:
                self._watches.append((client, first, rest.rstrip(b"\0")))
                return OK
            case Op.UNWATCH:
                self._watches.remove((client, first, rest.rstrip(b"\0")))
                return OK
            case Op.TRANSACTION_START:
                self._last_tx += 1
                self._transactions[self._last_tx] = _Transaction(self._tree.copy(), len(self._changes))
                return b"%d\0" % self._last_tx
            case Op.TRANSACTION_END:
                return self._end(asked.tx_id, commit=first == b"T")
            case Op.IS_DOMAIN_INTRODUCED:
                return b"T\0" if self._tree.has(f"/local/domain/{path}") or path == "0" else b"F\0"
            case Op.GET_DOMAIN_PATH:
                return b"/local/domain/" + first + b"\0"
            case Op.RESUME:
                if not any(each.startswith(f"/local/domain/{path}/") for each in self._tree.values):
                    raise _Refused("ENOENT")
                return OK
        raise _Refused("ENOSYS")

    def _end(self, tx_id: int, *, commit: bool) -> bytes:
        transaction = self._transactions.pop(tx_id)
        if commit:
            if transaction.touched & set(self._changes[transaction.began :]):
                raise _Refused("EAGAIN")
            for op, path, value in transaction.done:
                self._change(op, path, value)
        return OK

    def _change(self, op: Op, path: str, value: bytes) -> None:
        _apply(self._tree, op, path, value)
        self._changes.append(path)
        self._fire(path)

    def _fire(self, path: str) -> None:
        for client, watched, token in self._watches:
            if f"{path}/".startswith(f"{watched.decode()}/"):
                client.sendall(as_bytes(Message(Op.WATCH_EVENT, 0, 0, path.encode() + b"\0" + token + b"\0")))


def _apply(tree: _Tree, op: Op, path: str, value: bytes) -> None:
    if op is Op.RM:
        tree.remove(path)
    else:
        tree.make(path, value if op is Op.WRITE else None)
