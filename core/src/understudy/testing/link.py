"""A simulated link between two hosts: a cable that can be cut, slowed and broken, ports and channels on it.

What TCP promises holds: within one port or channel, what arrives arrives in order and whole, and what a cut cable
stalls arrives after it was mended, unless the connection was given up meanwhile. Two ports, or a port and a channel,
know no order between them. A side that hears nothing for `SimulatedCable.silence_s` takes the connection for lost, as
it would without heartbeats.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from understudy.errors import LinkLost, PeerError
from understudy.link.port import Json, LostCallback, NoteHandler, RequestHandler
from understudy.phases import in_words

__all__ = ["SimulatedCable", "SimulatedConnection", "SimulatedPort"]

Deliver = Callable[[], None]


@dataclass
class SimulatedCable:
    """The cable between two hosts.

    Args:
        delay_s: From one end to the other.
        jitter_s: Added to it, at random, for each message.
        silence_s: After how long without a sign a side takes its connections for lost.
        seed: Of the jitter.
    """

    delay_s: float = 0.0002
    jitter_s: float = 0.0
    silence_s: float = 0.3
    seed: int = 0
    _cut: set[str] = field(default_factory=set)  # hosts from which nothing gets through
    _lanes: list[Lane] = field(default_factory=list)
    _connections: list[SimulatedConnection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - to be repeatable

    def cut(self, *senders: str) -> None:
        """Let nothing through that these hosts send, and say nothing of it."""
        self._cut |= set(senders)
        for connection in tuple(self._connections):
            connection.listen()

    def mend(self) -> None:
        """Let everything through again; what was stalled arrives, in order."""
        self._cut.clear()
        for connection in tuple(self._connections):
            connection.listen()
        for lane in tuple(self._lanes):
            lane.wake()

    def is_cut(self, sender: str) -> bool:
        """Tell whether what a host sends is dropped."""
        return sender in self._cut

    def connect(self, name: str, first: str, second: str) -> SimulatedConnection:
        """Return a new connection between two hosts."""
        connection = SimulatedConnection(self, name, first, second)
        self._connections.append(connection)
        return connection

    def lane(self, sender: str) -> Lane:
        """Return a new way from a host to the other one, on which everything stays in order."""
        lane = Lane(self, sender)
        self._lanes.append(lane)
        return lane

    def die(self, host: str, *, silent: bool) -> None:
        """End everything that a host, or its agent, had open.

        Args:
            host: Which one.
            silent: It lost its power, or the cable: the other one hears nothing. Else its kernel resets everything.
        """
        for connection in tuple(self._connections):
            if host in connection.ports:
                connection.die(host, silent=silent)

    def forget(self, *gone: Lane | SimulatedConnection) -> None:
        """Drop what is over."""
        for each in gone:
            if isinstance(each, Lane):
                each.dead = True
                if each in self._lanes:
                    self._lanes.remove(each)
            elif each in self._connections:
                self._connections.remove(each)


class Lane:
    """One direction of one port or channel: everything stays in order, whatever the cable does.

    Args:
        cable: Where it is.
        sender: From which host.
    """

    def __init__(self, cable: SimulatedCable, sender: str) -> None:
        self.cable = cable
        self.sender = sender
        self.dead = False  #: nothing arrives any more
        self._under_way: deque[tuple[float, Deliver]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def send(self, deliver: Deliver) -> None:
        """Call `deliver` when what is sent now has arrived."""
        if self.dead:
            return
        cable = self.cable
        delay_s = cable.delay_s + (cable.random.random() * cable.jitter_s if cable.jitter_s else 0.0)
        arrives = asyncio.get_running_loop().time() + delay_s
        if self._under_way:
            arrives = max(arrives, self._under_way[-1][0])
        self._under_way.append((arrives, deliver))
        self.wake()

    def wake(self) -> None:
        """Look whether something can arrive."""
        if self._timer is None and self._under_way and not self.cable.is_cut(self.sender):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(self._under_way[0][0], loop.time()), self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._under_way and not self.dead and not self.cable.is_cut(self.sender):
            if self._under_way[0][0] > now:
                break
            _, deliver = self._under_way.popleft()
            deliver()
        if not self.dead:
            self.wake()


class SimulatedConnection:
    """One connection between two agents, with a port on each of them.

    Args:
        cable: Where it runs.
        name: For people.
        first: One host.
        second: The other.
    """

    def __init__(self, cable: SimulatedCable, name: str, first: str, second: str) -> None:
        self.cable = cable
        self.name = name
        self.ports = {first: SimulatedPort(self, first), second: SimulatedPort(self, second)}
        self.peers = {first: second, second: first}
        self.lanes = {first: cable.lane(first), second: cable.lane(second)}
        self._silent: set[str] = set()  # hosts that died without a word
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def send(self, sender: str, message: Json) -> None:
        """Send a message to the other host's port."""
        port = self.ports[self.peers[sender]]
        wire = json.dumps(message)
        self.lanes[sender].send(lambda: port.arrive(json.loads(wire)))

    def listen(self) -> None:
        """Begin or end to wait for the sign of life that does not come."""
        loop = asyncio.get_running_loop()
        for host, peer in self.peers.items():
            deaf = self.cable.is_cut(peer) or peer in self._silent
            if deaf and host not in self._timers and self.ports[host].lost is None:
                lost = LinkLost(f"{peer} has been silent", silent_ns=int(self.cable.silence_s * 1e9))
                self._timers[host] = loop.call_later(self.cable.silence_s, self._give_up, host, lost)
            elif not deaf and host in self._timers:
                self._timers.pop(host).cancel()

    def die(self, host: str, *, silent: bool) -> None:
        """End one host's half: its agent is gone."""
        self.ports[host].vanish()
        self.lanes[self.peers[host]].dead = True
        if silent:
            self._silent.add(host)
            self.lanes[host].dead = True
            self.listen()
        else:
            peer = self.peers[host]
            self.lanes[host].send(lambda: self._give_up(peer, LinkLost(f"{host} has closed the connection")))

    def _give_up(self, host: str, lost: LinkLost) -> None:
        # This side closes; the other one hears of it if anything gets through to it.
        port, peer = self.ports[host], self.peers[host]
        if port.lost is not None:
            return
        self._end_timer(host)
        self.lanes[peer].dead = True
        port.lose(lost)
        if self.ports[peer].lost is None:
            told = LinkLost(f"{host} has given the connection up")
            self.lanes[host].send(lambda: self._give_up(peer, told))
        else:
            self.cable.forget(self, *self.lanes.values())

    def _end_timer(self, host: str) -> None:
        timer = self._timers.pop(host, None)
        if timer is not None:
            timer.cancel()


class SimulatedPort:
    """One side's port (`understudy.link.PeerPort`).

    Args:
        connection: What it runs on.
        host: Whose it is.
    """

    def __init__(self, connection: SimulatedConnection, host: str) -> None:
        self.connection = connection
        self.host = host
        self._lost: LinkLost | None = None
        self._requests: RequestHandler | None = None
        self._notes: NoteHandler | None = None
        self._callbacks: list[LostCallback] = []
        self._asked: dict[int, asyncio.Future[Json]] = {}
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._early: list[Json] = []  # what arrived before `serve`
        self._number = 0
        self._closed = False

    @property
    def lost(self) -> LinkLost | None:
        """Why the connection is gone."""
        return self._lost

    async def request(self, method: str, params: Json, *, timeout_s: float) -> Json:
        """Ask the other side."""
        if self._lost is not None or self._closed:
            raise self._lost or LinkLost("this port is closed")
        self._number = number = self._number + 1
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._send({"t": "ask", "n": number, "m": method, "p": dict(params)})
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            self._send({"t": "drop", "n": number})
            raise LinkLost(f"no answer to {method!r} within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._send({"t": "drop", "n": number})
            raise
        finally:
            self._asked.pop(number, None)

    def notify(self, method: str, params: Json) -> None:
        """Tell the other side."""
        self._send({"t": "note", "m": method, "p": dict(params)})

    def serve(self, requests: RequestHandler, notes: NoteHandler | None = None) -> None:
        """Take what the other side asks and tells from now on."""
        self._requests, self._notes = requests, notes
        early, self._early = self._early, []
        for message in early:
            self.arrive(message)

    def on_lost(self, callback: LostCallback) -> None:
        """Call `callback` once when the connection is lost."""
        if self._lost is not None:
            callback(self._lost)
        else:
            self._callbacks.append(callback)

    def close(self) -> None:
        """End the conversation on this side."""
        self._closed = True
        self._requests = self._notes = None
        self._callbacks.clear()
        current = asyncio.current_task()
        for task in self._serving.values():
            if task is not current:
                task.cancel()

    # --- The connection's side -----------------------------------------------------------------------------------

    def arrive(self, message: Json) -> None:
        """Take a message of the other side."""
        if self._closed or self._lost is not None:
            return
        kind, number = message["t"], message.get("n", 0)
        if self._requests is None and kind in {"ask", "note"}:
            self._early.append(message)
        elif kind == "ask":
            work = self._serve(number, message["m"], message["p"])
            self._serving[number] = asyncio.get_running_loop().create_task(work, name=f"serve {message['m']}")
        elif kind == "drop" and number in self._serving:
            self._serving[number].cancel()
        elif kind == "note" and self._notes is not None:
            self._notes(message["m"], message["p"])
        elif number in self._asked and not self._asked[number].done():
            if kind == "answer":
                self._asked[number].set_result(message["p"])
            elif kind == "error":
                self._asked[number].set_exception(PeerError(message["e"], message["k"]))

    def lose(self, lost: LinkLost) -> None:
        """Tell everybody who waits that the connection is gone."""
        self._lost = lost
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(lost)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(lost)

    def vanish(self) -> None:
        """End without telling anybody: the agent is gone."""
        self.close()
        self._lost = self._lost or LinkLost("this agent is gone")
        for task in self._serving.values():
            task.cancel()

    def _send(self, message: Json) -> None:
        if self._lost is None and not self._closed:
            self.connection.send(self.host, message)

    async def _serve(self, number: int, method: str, params: Json) -> None:
        try:
            assert self._requests is not None  # noqa: S101 - looked at before the task was made
            answer: dict[str, Any] = {
                "t": "answer",
                "n": number,
                "p": dict(await self._requests(method, params)),
            }
        except Exception as error:  # noqa: BLE001 - the caller's business
            answer = {"t": "error", "n": number, "e": in_words(error), "k": type(error).__name__}
        finally:
            self._serving.pop(number, None)
        self._send(answer)
