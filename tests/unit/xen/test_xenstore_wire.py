from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy_xen.xenstore import (
    Access,
    Permission,
    XenStoreConflict,
    XenStoreGarbage,
    XenStoreLimit,
    XenStoreMissing,
    XenStoreRefused,
    asking,
)
from understudy_xen.xenstore.errors import refusal
from understudy_xen.xenstore.wire import (
    Decoder,
    Message,
    Op,
    encode,
    path_bytes,
    special_or_path_bytes,
    strings,
)

MESSAGES = st.builds(
    Message,
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=64) | st.binary(min_size=4090, max_size=4096),
)


def as_sent(message: Message) -> bytes:
    return (
        struct.pack("=IIII", message.op, message.req_id, message.tx_id, len(message.payload))
        + message.payload
    )


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 5000))
def test_messages_come_whole_and_in_order_however_they_are_cut(messages: list[Message], size: int) -> None:
    sent = b"".join(as_sent(message) for message in messages)
    decoder = Decoder()
    got = [message for at in range(0, len(sent), size) for message in decoder.feed(sent[at : at + size])]
    assert got == messages
    assert decoder.pending_bytes == 0


@given(st.binary(max_size=20000), st.integers(1, 700))
def test_any_bytes_leave_at_most_one_message_waiting(data: bytes, size: int) -> None:
    decoder = Decoder()
    try:
        for at in range(0, len(data), size):
            decoder.feed(data[at : at + size])
            assert decoder.pending_bytes <= 16 + 4096
    except XenStoreGarbage:
        pass


def test_a_header_that_claims_too_much_is_refused_before_its_payload_comes() -> None:
    with pytest.raises(XenStoreGarbage, match="claims 4097 bytes"):
        Decoder().feed(struct.pack("=IIII", Op.READ, 1, 0, 4097))


def test_a_request_is_as_long_as_xenstored_takes_and_no_longer() -> None:
    assert len(encode(Op.WRITE, 1, 0, b"x" * 4096)) == 16 + 4096
    with pytest.raises(XenStoreLimit, match="4097 bytes was not sent"):
        encode(Op.WRITE, 1, 0, b"x" * 4097)


@pytest.mark.parametrize("path", ["/", "/a", "/local/domain/0", "relative/path", "/A-b_c@d/9"])
def test_a_path_that_xenstored_takes(path: str) -> None:
    assert path_bytes(path) == path.encode()


@pytest.mark.parametrize(
    "path", ["", "//", "/a/", "/a//b", "/a b", "/a\0", "/ä", "/a:b", "/" + "x" * 3072, "x" * 2049, "/a\n"]
)
def test_a_path_that_it_does_not_take_is_not_sent(path: str) -> None:
    with pytest.raises(XenStoreLimit):
        path_bytes(path)


def test_the_longest_paths() -> None:
    assert path_bytes("/" + "x" * 3071)
    assert path_bytes("x" * 2048)


@pytest.mark.parametrize("path", ["@releaseDomain", "@introduceDomain", "@releaseDomain/3", "/a"])
def test_what_may_be_watched(path: str) -> None:
    assert special_or_path_bytes(path) == path.encode()


def test_what_may_not_be_watched() -> None:
    with pytest.raises(XenStoreLimit):
        special_or_path_bytes("@release Domain")


@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda name: b"\0" not in name)))
def test_strings_with_a_zero_after_each(names: list[bytes]) -> None:
    assert strings(b"".join(name + b"\0" for name in names)) == names


@given(st.integers(0, 65535), st.sampled_from(Access))
def test_a_permission_and_its_word(domid: int, access: Access) -> None:
    permission = Permission(domid, access)
    assert Permission.parse(str(permission)) == permission


@pytest.mark.parametrize("word", ["", "x3", "r", "rr"])
def test_a_word_that_is_no_permission(word: str) -> None:
    with pytest.raises(XenStoreGarbage):
        Permission.parse(word)


def test_a_node_without_permissions_cannot_be_asked_for() -> None:
    with pytest.raises(XenStoreLimit, match="at least one permission"):
        asking.set_perms("/a", [])


def test_the_root_is_not_removed() -> None:
    with pytest.raises(XenStoreLimit, match="root"):
        asking.rm("/")


def test_a_value_of_any_bytes_comes_back_as_it_was() -> None:
    raw = bytes(range(256))
    text = asking.read("/a").parse(raw)
    assert asking.write("/a", text).payload == b"/a\0" + raw


@pytest.mark.parametrize(
    ("code", "kind"),
    [("ENOENT", XenStoreMissing), ("EAGAIN", XenStoreConflict), ("EACCES", XenStoreRefused)],
)
def test_a_refusal_has_the_type_of_its_code(code: str, kind: type[XenStoreRefused]) -> None:
    error = refusal("READ /a", code)
    assert type(error) is kind
    assert (error.what, error.code) == ("READ /a", code)
    assert str(error) == f"xenstored refused READ /a: {code}"
