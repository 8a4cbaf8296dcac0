"""One conversation on a connection: the `PeerPort` that engines hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from understudy.errors import LinkLost
from understudy.link.port import Json, LostCallback, NoteHandler, RequestHandler

if TYPE_CHECKING:
    from understudy.link.connection import Connection

__all__ = ["Conversation"]

log = logging.getLogger("understudy.link")


class Conversation:
    """A `PeerPort` on one connection; made by `Connection.open`.

    Args:
        connection: What it runs on.
        name: The same on both sides.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.requests: RequestHandler | None = None
        self.serving: set[asyncio.Task[None]] = set()
        self.closing: list[Callable[[], None]] = []  #: called when it is closed
        self._notes: NoteHandler | None = None
        self._callbacks: list[LostCallback] = []
        self._closed = False

    @property
    def lost(self) -> LinkLost | None:
        """Why the connection is gone, ``None`` while it is up."""
        return self.connection.lost

    async def request(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other side; see `PeerPort.request`."""
        return await self.connection.ask(self.name, method, params, timeout_s)

    def notify(self, method: str, params: Json) -> None:
        """Tell the other side; see `PeerPort.notify`."""
        self.connection.send({"t": "note", "to": self.name, "m": method, "p": params})

    def serve(self, requests: RequestHandler, notes: NoteHandler | None = None) -> None:
        """Take what the other side asks and tells; see `PeerPort.serve`."""
        self.requests = requests
        self._notes = notes

    def on_lost(self, callback: LostCallback) -> None:
        """Call `callback` once when the connection is lost, or now if it is."""
        if self.connection.lost is not None:
            callback(self.connection.lost)
        else:
            self._callbacks.append(callback)

    def close(self) -> None:
        """End the conversation on this side; see `PeerPort.close`."""
        if self._closed:
            return
        self._closed = True
        self.requests = self._notes = None
        self._callbacks.clear()
        for task in self.serving - {asyncio.current_task()}:
            task.cancel()
        self.connection.forget(self)
        for each in self.closing:
            each()

    def take_note(self, method: str, params: Json) -> None:
        """Hand a note to its handler."""
        if self._notes is None:
            return
        try:
            self._notes(method, params)
        except Exception:
            log.exception("a note %r of %s could not be taken", method, self.connection.address)

    def lose(self, lost: LinkLost) -> None:
        """Tell everyone who asked that the connection is gone."""
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(lost)
            except Exception:
                log.exception("somebody who was told of a lost link failed")
