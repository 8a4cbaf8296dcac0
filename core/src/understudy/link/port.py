"""What an engine sees of the way to the other host: a port, one per session, on the one link between two agents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from understudy.errors import LinkLost

__all__ = ["Json", "LostCallback", "NoteHandler", "PeerPort", "RequestHandler"]

Json = Mapping[str, Any]
RequestHandler = Callable[[str, Json], Awaitable[Json]]
NoteHandler = Callable[[str, Json], None]
LostCallback = Callable[[LinkLost], None]


class PeerPort(Protocol):
    """One numbered conversation with the other host's agent; it dies with the connection and does not come back.

    Requests and notes leave in the order of the calls and are begun in that order on the other side; requests run
    there concurrently.
    """

    @property
    def lost(self) -> LinkLost | None:
        """Why the connection is gone, ``None`` while it is up."""

    async def request(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other side and return its answer.

        Args:
            method: A word both sides know.
            params: JSON-able arguments.
            timeout_s: How long to wait, seconds. At the deadline, and when the caller is cancelled, the other side is
                told to cancel its work too.

        Raises:
            LinkLost: The connection is gone, or the answer did not come in time.
            PeerError: The other side raised: its text, and in `PeerError.kind` the name of its error's class.
        """

    def notify(self, method: str, params: Json) -> None:
        """Tell the other side; no answer, never waits. Silently nothing when the connection is gone."""

    def serve(self, requests: RequestHandler, notes: NoteHandler | None = None) -> None:
        """Take what the other side asks and tells from now on.

        Args:
            requests: Awaited in a task of its own per request; what it raises goes to the caller as `PeerError`. It is
                cancelled when the caller gives up, and when the port is closed; not by the loss of the connection.
            notes: Called at once for each note; must not block.
        """

    def on_lost(self, callback: LostCallback) -> None:
        """Call `callback` once when the connection is lost, or now if it is. Its argument is the first cause."""

    def close(self) -> None:
        """End the conversation on this side; what is being served for it is cancelled. Idempotent."""
