"""The link to one other host: dialled, or taken when it dials.

Both sides of a pair dial, so that a route or firewall that works in one direction is enough. The side that is dialled
decides alone whether a connection counts, so the two never disagree:

* it has a connection to this very run of the peer's agent: refused as a duplicate;
* it has one to an earlier run of it: that one is lost, the new one counts;
* it is dialling the peer itself at the moment: the dial of the host with the smaller name counts;
* otherwise it counts.

The dialling side takes the answer only from an agent of its own protocol version that is the host it dialled.

There is no encryption and no authentication yet. `PeerLink._connect` and `understudy.link.links.Links.start` are the
two places where a connection is made: that is where it will be.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from understudy.errors import LinkLost, PeerError
from understudy.link.connection import Connection
from understudy.link.conversation import Conversation
from understudy.link.frame import Frame
from understudy.link.identity import Identity, Timing

__all__ = ["PeerLink"]

log = logging.getLogger("understudy.link")

DIAL_LIMIT_S = 2.0
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0


class PeerLink:
    """The link to one other host, up or not.

    Args:
        me: This agent.
        name: The other host.
        address: Its numeric address.
        port: Its port.
        timing: Heartbeats.
        changed: Called whenever the link has come up or gone down.
    """

    def __init__(
        self,
        me: Identity,
        name: str,
        address: str,
        port: int,
        timing: Timing,
        changed: Callable[[PeerLink], None],
    ) -> None:
        self.name = name
        self.address = address
        self.port = port
        self.connection: Connection | None = None  #: the one that is up
        self.problem = "not connected yet"  #: why the link is down, one sentence; empty while it is up
        self.agent = ""  #: version of the other agent, as it last said
        self._me = me
        self._timing = timing
        self._changed = changed
        self._incarnation = ""
        self._dialling: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()
        self._closing = False

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self.connection is not None

    def open(self, name: str) -> Conversation:
        """Open the conversation `name` on the connection that is up.

        Raises:
            LinkLost: None is.
        """
        if self.connection is None:
            raise LinkLost(f"there is no link to {self.name}: {self.problem}")
        return self.connection.open(name)

    async def wait_up(self, timeout_s: float) -> None:
        """Wait until the link is up.

        Raises:
            LinkLost: It is not after `timeout_s`; the text says what was tried.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connection is None:
                    self._moved.clear()
                    await self._moved.wait()
        if self.connection is None:
            raise LinkLost(f"there is no link to {self.name}: {self.problem}")

    # --- Dialling ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            if self.connection is None:
                self._dialling = asyncio.create_task(self._dial(), name=f"dial {self.name}")
                try:
                    await asyncio.wait({self._dialling})
                finally:
                    self._dialling.cancel()
            if self.connection is not None:
                retry_s = FIRST_RETRY_S
                self._moved.clear()
                await self._moved.wait()
                continue
            # Some disorder, so that two hosts do not dial in step for ever.
            await asyncio.sleep(retry_s * random.uniform(0.7, 1.3))  # noqa: S311 - no secret
            retry_s = min(retry_s * 2, LAST_RETRY_S)

    async def _dial(self) -> None:
        dial = _Dial(self)
        connection: Connection | None = None
        try:
            connection = await self._connect(dial)
            connection.send(self._me.header("hello") | {"peer": self.name})
            self._judge(await dial.answer)
        except LinkLost as error:
            self._blame(str(error))
        finally:
            if connection is not None and self.connection is not connection:
                connection.close("this connection is not wanted", goodbye=False)

    async def _connect(self, dial: _Dial) -> Connection:
        where = f"{self.address} port {self.port}"
        timing = self._timing
        try:
            async with asyncio.timeout(DIAL_LIMIT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(
                        dial.opener, dial.ended, interval_s=timing.interval_s, limit_s=timing.limit_s
                    ),
                    self.address,
                    self.port,
                )
        except TimeoutError:
            raise LinkLost(f"no connection to {where} within {DIAL_LIMIT_S:g} s") from None
        except OSError as error:
            raise LinkLost(
                f"no connection to {where}: {os.strerror(error.errno) if error.errno else error}"
            ) from error
        return connection

    def _judge(self, frame: Frame) -> None:
        header = frame.header
        if header["t"] == "refuse":
            if header.get("kind") not in {"duplicate", "crossing"}:
                self._blame(f"the agent on {self.name} refused the link: {header.get('reason')}")
        elif header["t"] != "welcome":
            self._blame(f"the agent on {self.name} broke the protocol: it began with {header['t']!r}")

    def welcome(self, connection: Connection, header: Mapping[str, Any]) -> None:
        """Take the other side's consent to a connection that we made, unless it is not the agent we wanted."""
        problem = self._me.misfit(connection.version, header)
        if not problem and header.get("host") != self.name:
            problem = f"{self.address} port {self.port} is {header.get('host')}, not {self.name}"
        if problem:
            self._blame(problem)
            connection.send({"t": "bye", "reason": problem})  # for it the link is up
            connection.close(problem, goodbye=False)
        else:
            self.activate(connection, header)

    # --- Being dialled -------------------------------------------------------------------------------------------

    def offer(self, connection: Connection, hello: Mapping[str, Any]) -> None:
        """Decide about a connection that this peer made."""
        incarnation = str(hello.get("incarnation"))
        if self.connection is not None and incarnation == self._incarnation:
            connection.refuse("duplicate", "there is a link already")
            return
        if self.connection is not None:
            self.connection.abort(f"the agent on {self.name} was started anew")
        if self._dialling is not None and not self._dialling.done():
            if self._me.host < self.name:
                connection.refuse("crossing", f"{self._me.host} is dialling at the same time")
                return
            self._dialling.cancel()
        connection.send(self._me.header("welcome"))
        self.activate(connection, hello)

    # --- Up and down ---------------------------------------------------------------------------------------------

    def activate(self, connection: Connection, header: Mapping[str, Any]) -> None:
        """Take `connection` for the link; `header` is the other side's first frame."""
        self.connection = connection
        self.problem = ""
        self.agent = str(header.get("agent"))
        self._incarnation = str(header.get("incarnation"))
        connection.activate(self.name)
        log.info("the link to %s is up, agent %s", connection.address, self.agent)
        self._changed(self)
        self._moved.set()

    def ended(self, connection: Connection, lost: LinkLost) -> None:
        """Take the end of a connection to this peer, whether it is the link or not."""
        if connection is not self.connection:
            return
        self.connection = None
        self.problem = str(lost)
        log.log(
            logging.INFO if self._closing else logging.WARNING, "the link to %s is lost: %s", self.name, lost
        )
        self._changed(self)
        self._moved.set()

    def _blame(self, problem: str) -> None:
        if self.connection is None and problem != self.problem:
            self.problem = problem
            log.warning("no link to %s: %s", self.name, problem)

    def close(self, reason: str) -> None:
        """Close the connection if there is one; the other side is told why."""
        self._closing = True
        if self._dialling:
            self._dialling.cancel()
        if self.connection:
            self.connection.close(reason)


class _Dial:
    # What becomes of one connection that we made.

    def __init__(self, link: PeerLink) -> None:
        self._link = link
        self.answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting any more; asyncio would complain about an error that nobody looked at.
        self.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())

    def opener(self, connection: Connection, frame: Frame) -> None:
        if self.answer.done():
            raise PeerError("something was sent before the link was up")
        self.answer.set_result(frame)
        # At once: what follows a welcome in the same packet must find the connection up.
        if frame.header["t"] == "welcome" and not self._link.up:
            self._link.welcome(connection, frame.header)

    def ended(self, connection: Connection, lost: LinkLost) -> None:
        if not self.answer.done():
            self.answer.set_exception(LinkLost(str(lost)))
        self._link.ended(connection, lost)
