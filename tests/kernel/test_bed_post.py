"""The messages between host and bed, both ends outside: what a line in pieces, a silence and a death look like."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbeds.kernel.post import FilePost
from tests.testbeds.post import LineClosed


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[FilePost, FilePost, socket.socket]]:
    host, guest = socket.socketpair()
    with host, guest:
        yield FilePost(host.fileno(), tmp_path, "h", "g"), FilePost(guest.fileno(), tmp_path, "g", "h"), guest


def test_messages_arrive_in_order_and_leave_no_file(
    ends: tuple[FilePost, FilePost, socket.socket], tmp_path: Path
) -> None:
    host, guest, _ = ends
    sent = [{"number": number, "text": "ü\n" * number} for number in range(3)]
    for each in sent:
        host.send(each)
    guest.send(None)
    assert [guest.receive(5) for _ in sent] == sent
    assert host.receive(5) is None
    assert not list(tmp_path.iterdir())


def test_a_number_that_comes_in_pieces(
    ends: tuple[FilePost, FilePost, socket.socket], tmp_path: Path
) -> None:
    host, _, line = ends
    (tmp_path / "g12").write_text('"twelve"')
    (tmp_path / "g13").write_text('"thirteen"')
    line.send(b"1")
    assert list(host.ready()) == []
    line.send(b"2\n13")
    assert list(host.ready()) == ["twelve"]
    with pytest.raises(TimeoutError, match="no message within"):
        host.receive(0.01)
    line.send(b"\n")
    assert host.receive(5) == "thirteen"


def test_the_death_of_the_other_side(ends: tuple[FilePost, FilePost, socket.socket]) -> None:
    host, guest, line = ends
    guest.send("last words")
    line.close()
    assert host.receive(5) == "last words"
    with pytest.raises(LineClosed):
        host.receive(5)
    with pytest.raises(LineClosed):
        host.send("anybody?")
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(guest.line)
