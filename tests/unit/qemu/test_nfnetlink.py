"""The messages for nf_tables, octet for octet, as ``nft`` sends them; a kernel takes them in tests/qemu."""

from __future__ import annotations

import struct

from understudy_qemu.nfnetlink import batch, counter_request, element_added, set_flushed, table_deleted

TABLE = struct.pack("=HH", 6, 1) + b"t\0\0\0"
SET = struct.pack("=HH", 9, 2) + b"open\0\0\0\0"
GENERIC = bytes([5, 0, 0, 0])  # NFPROTO_NETDEV


def header(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def test_an_interface_is_added_with_its_timeout() -> None:
    key = struct.pack("=HHHH", 24, 0x8001, 20, 1) + b"tap0".ljust(16, b"\0")
    timeout = struct.pack("=HH", 12, 4) + (1500).to_bytes(8, "big")
    elements = struct.pack("=HHHH", 44, 0x8003, 40, 0x8001) + key + timeout
    assert element_added("t", "open", "tap0", 1500) == header(0xA0C, 0x401, GENERIC + TABLE + SET + elements)


def test_without_a_timeout_it_stays() -> None:
    assert element_added("t", "open", "tap0", 0)[-20:] == struct.pack("=HH", 20, 1) + b"tap0".ljust(16, b"\0")


def test_a_set_is_emptied_by_naming_no_element() -> None:
    assert set_flushed("t", "open") == header(0xA0E, 1, GENERIC + TABLE + SET)


def test_a_table_is_deleted_by_its_name() -> None:
    assert table_deleted("t") == header(0xA02, 1, GENERIC + TABLE)


def test_a_counter_is_asked_for_by_table_name_and_type() -> None:
    name = struct.pack("=HH", 11, 2) + b"passed\0\0"
    kind = struct.pack("=HH", 8, 3) + (1).to_bytes(4, "big")
    assert counter_request("t", "passed") == header(0xA13, 1, GENERIC + TABLE + name + kind)


def test_a_batch_is_one_transaction_that_answers_for_its_last_change() -> None:
    first, last = set_flushed("t", "open"), table_deleted("t")
    bracket = bytes([0, 0]) + (10).to_bytes(2, "big")
    assert batch(first, last) == b"".join(
        (header(0x10, 1, bracket), first, header(0xA02, 5, last[16:]), header(0x11, 1, bracket))
    )
