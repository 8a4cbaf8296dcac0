"""The client against what a real xenstored said; the recording itself is checked in the Xen bed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.xen.xenstore_exchange import (
    RECORDED,
    Playback,
    as_bytes,
    comparable,
    converse,
    differences,
    load,
)
from understudy_xen.xenstore import XenStore, XenStoreError
from understudy_xen.xenstore.wire import Decoder, Message, Op


async def test_the_whole_conversation(tmp_path: Path) -> None:
    place = tmp_path / "xenstored"
    async with Playback(place, load()) as playback:
        async with await XenStore.open(place) as store:
            await converse(store)
        assert not playback.unexpected
        assert not [message for way, message in playback.rest if way == "out"]


async def test_another_request_than_the_recorded_one_is_not_answered(tmp_path: Path) -> None:
    place = tmp_path / "xenstored"
    async with Playback(place, load()) as playback:
        async with await XenStore.open(place) as store:
            with pytest.raises(XenStoreError):
                await store.read("/local/domain/1/name")
        assert [message.payload for message in playback.unexpected] == [b"/local/domain/1/name\0"]


def test_the_recording_is_read_by_the_byte() -> None:
    messages = [message for _, message in load()]
    assert Decoder().feed(b"".join(map(as_bytes, messages))) == messages
    assert {message.op for message in messages} >= {op for op in Op if op is not Op.UNWATCH}
    assert RECORDED.name == "xenstore-4.17.json"


def test_what_differs_each_time_is_not_compared_and_the_rest_is() -> None:
    said = load()
    other = [
        (
            way,
            Message(m.op, m.req_id, m.tx_id, b"9" + m.payload[1:])
            if m.op == Op.DIRECTORY_PART and way == "in"
            else m,
        )
        for way, m in said
    ]
    assert other != said
    assert not differences(comparable(said), comparable(other))
    way, message = said[1]
    said[1] = (way, Message(message.op, message.req_id, message.tx_id, b"Domain-1"))
    assert differences(comparable(said), comparable(other)) == [
        "in 0: (2, 1, 0, b'Domain-1') is not (2, 1, 0, b'Domain-0')"
    ]
