"""Two links over real TCP on the loopback interface."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from understudy.errors import LinkError, LinkLost, PeerError, StateError
from understudy.link import Conversation, Links, PeerChannels, PeerLink, Timing
from understudy.link.frame import PREAMBLE, Decoder, encode, preamble

FAST = Timing(interval_s=0.02, limit_s=0.2)
HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells; the deadline is above
            await asyncio.sleep(0.01)


class Pair:
    """Two hosts that know each other, and everything that happened to their links."""

    def __init__(self, timing: Timing = FAST, **alpha: Any) -> None:
        self.ports = {"alpha": free_port(), "beta": free_port()}
        self.changes: list[tuple[str, bool]] = []
        self.a = self.make("alpha", timing, **alpha)
        self.b = self.make("beta", timing)

    def make(self, host: str, timing: Timing = FAST, **more: Any) -> Links:
        other = "beta" if host == "alpha" else "alpha"
        return Links(
            host,
            "1.0",
            [(other, HOST, self.ports[other])],
            timing=timing,
            changed=lambda link: self.changes.append((host, link.up)),
            **more,
        )

    @property
    def ab(self) -> PeerLink:
        return self.a.peers["beta"]

    @property
    def ba(self) -> PeerLink:
        return self.b.peers["alpha"]

    async def up(self) -> None:
        await asyncio.gather(self.ab.wait_up(5), self.ba.wait_up(5))

    def open(self, name: str = "s") -> tuple[Conversation, Conversation]:
        return self.ab.open(name), self.ba.open(name)


@asynccontextmanager
async def pair(timing: Timing = FAST, **alpha: Any) -> AsyncIterator[Pair]:
    it = Pair(timing, **alpha)
    await it.a.start(HOST, it.ports["alpha"])
    await it.b.start(HOST, it.ports["beta"])
    try:
        yield it
    finally:
        await it.a.close("test is over")
        await it.b.close("test is over")


async def echo(method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
    if method == "fail":
        raise StateError("not now")
    if method == "sleep":
        await asyncio.sleep(60)
    return {"method": method, **params}


def wait_lost(port: Conversation) -> asyncio.Future[LinkLost]:
    future: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
    port.on_lost(future.set_result)
    return future


async def test_both_dial_and_one_link_remains() -> None:
    async with pair() as p:
        await p.up()
        await asyncio.sleep(0.3)  # more than the limit and several retries: nothing may change any more
        assert p.changes in ([("alpha", True), ("beta", True)], [("beta", True), ("alpha", True)])
        assert p.ab.agent == "1.0"
        assert p.ab.problem == ""


async def test_requests_and_notes_in_both_directions() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        notes: list[object] = []
        arrived = asyncio.Event()

        def take(method: str, params: Mapping[str, Any]) -> None:
            notes.append((method, params))
            arrived.set()

        a.serve(echo, take)
        b.serve(echo)
        assert await a.request("x", {"n": 1}, timeout_s=5) == {"method": "x", "n": 1}
        assert await b.request("y", {"n": "ü"}, timeout_s=5) == {"method": "y", "n": "ü"}
        b.notify("hint", {"k": [1]})
        await asyncio.wait_for(arrived.wait(), 5)
        assert notes == [("hint", {"k": [1]})]


async def test_an_error_comes_back_with_its_class() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        b.serve(echo)
        with pytest.raises(PeerError, match="not now") as caught:
            await a.request("fail", {}, timeout_s=5)
        assert caught.value.kind == "StateError"
        with pytest.raises(PeerError, match="no conversation 'other'"):
            await p.ab.open("other").request("x", {}, timeout_s=5)


async def test_a_late_answer_is_given_up_and_the_work_cancelled() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        ended = asyncio.Event()

        async def slow(method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return {}

        b.serve(slow)
        with pytest.raises(LinkLost, match="did not answer 'x' within"):
            await a.request("x", {}, timeout_s=0.05)
        await asyncio.wait_for(ended.wait(), 5)
        assert p.ab.up


async def test_a_cancelled_request_cancels_the_work() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        begun, ended = asyncio.Event(), asyncio.Event()

        async def slow(method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return {}

        b.serve(slow)
        asking = asyncio.create_task(a.request("x", {}, timeout_s=60))
        await asyncio.wait_for(begun.wait(), 5)
        asking.cancel()
        await asyncio.wait_for(ended.wait(), 5)


async def test_closing_a_conversation_cancels_what_it_serves() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        b.serve(echo)
        asking = asyncio.create_task(a.request("sleep", {}, timeout_s=60))
        await until(lambda: bool(b.serving))
        b.close()
        b.close()
        with pytest.raises(PeerError, match="cancelled"):
            await asyncio.wait_for(asking, 5)


async def test_a_closed_agent_is_a_loss_on_the_other_side_and_comes_back() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open()
        b.serve(echo)
        lost = wait_lost(a)
        waiting = asyncio.create_task(a.request("sleep", {}, timeout_s=60))
        await until(lambda: bool(b.serving))
        await p.b.close("maintenance")
        assert "maintenance" in str(await asyncio.wait_for(lost, 5))
        with pytest.raises(LinkLost, match="maintenance"):
            await waiting
        with pytest.raises(LinkLost):
            await a.request("x", {}, timeout_s=5)
        assert "maintenance" in str(a.lost)
        assert "maintenance" in str(await wait_lost(a))  # told at once when it is asked for too late
        p.b = p.make("beta")
        await p.b.start(HOST, p.ports["beta"])
        await p.up()
        assert a.lost is not None  # a conversation does not come back


class Wire:
    """A TCP proxy that can fall silent, as a cable that was cut does."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.cut = False
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._visit, HOST, 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            there, back = await asyncio.open_connection(HOST, self.target)
        except OSError:
            writer.close()
            return
        self._writers.append(back)
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if not self.cut:
                    sink.write(data)
        sink.close()

    async def close(self) -> None:
        assert self._server
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)


async def test_silence_is_a_loss_after_the_limit_and_not_before() -> None:
    ports = {"alpha": free_port(), "beta": free_port()}
    wire = Wire(ports["beta"])
    wire_port = await wire.start()
    a = Links("alpha", "1", [("beta", HOST, wire_port)], timing=FAST)
    b = Links("beta", "1", [("alpha", HOST, 1)], timing=FAST)  # nothing listens there: only alpha can dial
    await a.start(HOST, ports["alpha"])
    await b.start(HOST, ports["beta"])
    try:
        await asyncio.gather(a.peers["beta"].wait_up(5), b.peers["alpha"].wait_up(5))
        port, other = a.peers["beta"].open("s"), b.peers["alpha"].open("s")
        lost, lost_there = wait_lost(port), wait_lost(other)
        await asyncio.sleep(0.5)
        assert not lost.done()  # heartbeats keep it up
        loop = asyncio.get_running_loop()
        wire.cut = True
        since = loop.time()
        error = await asyncio.wait_for(lost, 5)
        await asyncio.wait_for(lost_there, 5)
        assert "silent for" in str(error)
        assert error.silent_ns >= FAST.limit_s * 1e9
        assert loop.time() - since > FAST.limit_s - 3 * FAST.interval_s
        assert not a.peers["beta"].up
    finally:
        await a.close("over")
        await b.close("over")
        await wire.close()


async def test_an_agent_started_anew_replaces_its_earlier_run() -> None:
    async with pair() as p:
        await p.up()
        a, _ = p.open()
        lost = wait_lost(a)
        # Another run of beta's agent, whose earlier one is still connected (as after a crash with a silent cable).
        again = p.make("beta")
        try:
            await again.start(HOST, 0)
            assert "started anew" in str(await asyncio.wait_for(lost, 5))
            await p.ab.wait_up(5)
        finally:
            await again.close("over")


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.0\r\n\r\n", PREAMBLE + b"\xff" * 8, PREAMBLE + encode({"t": "beat"})]
)
async def test_garbage_closes_that_connection_and_nothing_else(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as p:
        await p.up()
        caplog.clear()
        reader, writer = await asyncio.open_connection(HOST, p.ports["alpha"])
        writer.write(garbage)
        with_preamble = await asyncio.wait_for(reader.read(), 5)
        assert with_preamble == PREAMBLE
        writer.close()
        assert len([record for record in caplog.records if "no link" in record.getMessage()]) == 1
        assert p.ab.up
        assert p.ba.up


async def ask(port: int, first: bytes) -> Mapping[str, Any]:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(first)
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return next(iter(Decoder().feed(data))).header


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"host": "gamma"}, "unknown", "no peer 'gamma'"),
        ({"peer": "delta"}, "host", "this is alpha"),
        ({"protocol": 99, "agent": "9.9"}, "protocol", "version 99 of agent 9.9.*same version"),
    ],
)
async def test_a_stranger_is_told_why_it_is_refused(change: dict[str, Any], kind: str, words: str) -> None:
    async with pair() as p:
        hello = {
            "t": "hello",
            "host": "beta",
            "peer": "alpha",
            "agent": "1",
            "protocol": 1,
            "incarnation": "x",
        }
        answer = await ask(p.ports["alpha"], preamble(change.get("protocol", 1)) + encode(hello | change))
        assert (answer["t"], answer["kind"]) == ("refuse", kind)
        assert re.search(words, answer["reason"])


async def test_two_versions_tell_each_other() -> None:
    async with pair(protocol=2) as p:
        for link in (p.ab, p.ba):
            await until(lambda link=link: "install the same version" in link.problem)  # type: ignore[misc]
        assert p.changes == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": 99}, "protocol version 99 of agent 9.9 on beta is not version 1 of agent 1.0 on alpha"),
        ({"speaks": 99}, "protocol version 99 of agent 9.9 on beta is not version 1 of agent 1.0 on alpha"),
        ({"host": "gamma"}, "127.0.0.1 port [0-9]+ is gamma, not beta"),
    ],
)
async def test_a_welcome_of_another_agent_is_not_taken(change: dict[str, Any], words: str) -> None:
    said: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        given: dict[str, Any] = {"host": "beta", "agent": "9.9", "protocol": 1, "incarnation": "x"} | change
        writer.write(preamble(given.pop("speaks", 1)) + encode({"t": "welcome"} | given))
        frames = list(Decoder().feed(await reader.read()))
        writer.close()
        if not said.done():
            said.set_result(frames[-1].header)

    server = await asyncio.start_server(listen, HOST, 0)
    alpha = Links("alpha", "1.0", [("beta", HOST, server.sockets[0].getsockname()[1])], timing=FAST)
    await alpha.start(HOST, 0)
    try:
        bye = await asyncio.wait_for(said, 5)
        assert bye["t"] == "bye"
        assert re.search(words, bye["reason"])
        assert not alpha.peers["beta"].up
        assert re.search(words, alpha.peers["beta"].problem)
    finally:
        await alpha.close("over")
        server.close()


async def test_a_taken_port_is_one_sentence() -> None:
    async with pair() as p:
        other = Links("gamma", "1", [])
        with pytest.raises(LinkError, match=r"cannot listen on 127.0.0.1 port"):
            await other.start(HOST, p.ports["alpha"])


async def test_channels() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open("c")
        left, right = PeerChannels(a, HOST, HOST), PeerChannels(b, HOST, HOST)
        one, two = await asyncio.gather(left.connect("ram", timeout_s=5), right.accept("ram", timeout_s=5))
        with one, two:
            assert one.getblocking()
            assert two.getblocking()
            for sock in (one, two):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            one.sendall(b"page")
            assert two.recv(4) == b"page"
        # The other direction on the same pair, and the same name again.
        one, two = await asyncio.gather(left.accept("ram", timeout_s=5), right.connect("ram", timeout_s=5))
        one.close()
        two.close()


async def test_a_bulk_transfer_delays_no_heartbeat() -> None:
    async with pair(Timing(interval_s=0.05, limit_s=1.0)) as p:
        await p.up()
        a, b = p.open("c")
        left, right = PeerChannels(a, HOST, HOST), PeerChannels(b, HOST, HOST)
        one, two = await asyncio.gather(left.connect("ram", timeout_s=5), right.accept("ram", timeout_s=5))
        block, blocks = b"x" * (1 << 20), 64

        def send() -> None:
            with one:
                for _ in range(blocks):
                    one.sendall(block)

        def receive() -> int:
            total = 0
            with two:
                while data := two.recv(1 << 20):
                    total += len(data)
            return total

        _, total = await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receive))
        assert total == blocks << 20
        assert p.ab.up
        assert p.ba.up
        assert len(p.changes) == 2


async def test_a_channel_that_nobody_accepts_or_connects() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open("c")
        left, right = PeerChannels(a, HOST, HOST), PeerChannels(b, HOST, HOST)
        with pytest.raises(LinkLost, match=r"'x'|'open'"):
            await left.connect("x", timeout_s=0.1)
        with pytest.raises(LinkLost, match="nobody connected"):
            await right.accept("y", timeout_s=0.1)


async def test_a_stranger_on_a_channel_is_dropped_and_the_peer_is_not() -> None:
    async with pair() as p:
        await p.up()
        a, b = p.open("c")
        right = PeerChannels(b, HOST, HOST)
        accepting = asyncio.create_task(right.accept("ram", timeout_s=5))
        answer = await a.request("open", {"name": "ram"}, timeout_s=5)
        silent = await asyncio.open_connection(HOST, answer["port"])
        reader, writer = await asyncio.open_connection(HOST, answer["port"])
        writer.write(b"x" * 32)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        left = PeerChannels(a, HOST, HOST)
        one = await left._connect(answer["port"], bytes.fromhex(answer["token"]))
        two = await asyncio.wait_for(accepting, 5)
        one.close()
        two.close()
        for each in (silent[1], writer):
            each.close()


async def test_a_cancelled_accept_leaves_nothing() -> None:
    async with pair() as p:
        await p.up()
        _, b = p.open("c")
        right = PeerChannels(b, HOST, HOST)
        accepting = asyncio.create_task(right.accept("ram", timeout_s=60))
        await asyncio.sleep(0)
        accepting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await accepting
        assert right._offers == {}
