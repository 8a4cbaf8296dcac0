"""The sockets of a chain: strangers are turned away, what is left to read is known, a cut is a cut."""

from __future__ import annotations

import asyncio
import socket

import pytest

from understudy_colo_proxy import wires
from understudy_colo_proxy.wires import Listener


async def connected() -> tuple[list[socket.socket], list[socket.socket]]:
    listener = Listener("127.0.0.1")
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        accepting = tasks.create_task(listener.accept(2))
        connecting = tasks.create_task(wires.connect("127.0.0.1", listener.port, listener.token, 2))
    listener.close()
    return accepting.result(), connecting.result()


async def test_connections_come_in_the_order_of_their_numbers() -> None:
    near, far = await connected()
    for number in range(2):
        far[number].send(bytes([number]))
        assert await asyncio.get_running_loop().sock_recv(near[number], 9) == bytes([number])
        assert near[number].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    wires.shut(*near, *far)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n" * 4, b"0" * 32 + b"\0"])
async def test_strangers_are_turned_away(said: bytes) -> None:
    listener = Listener("127.0.0.1")
    accepting = asyncio.create_task(listener.accept(2))
    stranger = socket.create_connection(("127.0.0.1", listener.port))
    stranger.sendall(said)
    stranger.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(5):
        far = await wires.connect("127.0.0.1", listener.port, listener.token, 2)
        near = await accepting
    assert [sock.getpeername() for sock in near] == [sock.getsockname() for sock in far]
    listener.close()
    stranger.close()
    wires.shut(*near, *far)


async def test_the_port_is_the_kernels_choice_and_closed_afterwards() -> None:
    listener = Listener("127.0.0.1")
    assert listener.port > 1023
    listener.close()
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", listener.port))


async def test_what_is_left_is_counted() -> None:
    near, far = await connected()
    far[0].send(b"12345")
    assert await wires.drained(lambda: wires.unsent(far[0]), 5)
    assert await wires.drained(lambda: 5 - wires.unread(near[0]), 5)
    near[0].recv(5)
    assert wires.unread(near[0]) == 0
    assert not await wires.drained(lambda: 1, 0.01)
    wires.shut(*near, *far)
    assert wires.unread(near[0]) == wires.unsent(far[0]) == 0


async def test_a_cut_reaches_whoever_holds_a_duplicate() -> None:
    near, far = await connected()
    assert wires.established(near)
    assert wires.established(far)
    duplicate = near[0].dup()  # as QEMU has one
    wires.shut(near[0])
    assert duplicate.recv(1) == b""
    assert await wires.drained(lambda: int(wires.established(far)), 5)
    duplicate.close()
    wires.shut(*near, *far)
    assert not wires.established(near)


async def test_a_local_pair_takes_more_than_a_burst() -> None:
    write, read = wires.local_pair()
    packet = b"x" * 1500
    for _ in range(2048):
        assert write.send(packet) == len(packet)
    assert wires.unread(read) == 2048 * len(packet)
    write.close()
    read.close()
