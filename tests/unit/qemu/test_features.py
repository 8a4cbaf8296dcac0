"""Features are found by walking the schema."""

from __future__ import annotations

import pytest

from understudy_qemu.features import Features, Schema

# A small schema with every meta-type that lies between a command and a leaf.
ENTITIES: list[dict[str, object]] = [
    {"name": "chardev-add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {
        "name": "1",
        "meta-type": "object",
        "members": [{"name": "id", "type": "str"}, {"name": "backend", "type": "2"}],
    },
    {
        "name": "2",
        "meta-type": "object",
        "members": [{"name": "type", "type": "3"}],
        "tag": "type",
        "variants": [{"case": "socket", "type": "4"}, {"case": "file", "type": "0"}],
    },
    {"name": "3", "meta-type": "enum", "values": ["socket", "file"]},
    {"name": "4", "meta-type": "object", "members": [{"name": "data", "type": "5"}]},
    {"name": "5", "meta-type": "object", "members": [{"name": "reconnect", "type": "int"}]},
    {"name": "caps", "meta-type": "command", "arg-type": "6", "ret-type": "0"},
    {"name": "6", "meta-type": "object", "members": [{"name": "list", "type": "[7]"}]},
    {"name": "[7]", "meta-type": "array", "element-type": "7"},
    {
        "name": "7",
        "meta-type": "object",
        "members": [{"name": "capability", "type": "8"}, {"name": "next", "type": "9"}],
    },
    {"name": "8", "meta-type": "enum", "values": ["x-colo"]},
    {"name": "9", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "7"}]},
    {"name": "STOP", "meta-type": "event", "arg-type": "0"},
    {"name": "0", "meta-type": "object", "members": []},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
]


@pytest.fixture
def schema() -> Schema:
    return Schema.parse(ENTITIES)


@pytest.mark.parametrize(
    ("command", "members", "supported"),
    [
        ("chardev-add", [], True),
        ("chardev-add", ["id"], True),
        ("chardev-add", ["backend.type.socket"], True),
        ("chardev-add", ["backend.data.reconnect"], True),
        ("chardev-add", ["backend.data.reconnect-ms"], False),
        ("chardev-add", ["id", "nothing"], False),
        ("caps", ["list.capability.x-colo"], True),
        ("caps", ["list.next.capability.x-colo"], True),
        ("caps", ["list.capability.multifd"], False),
        ("no-such-command", [], False),
        ("STOP", [], False),
        ("str", [], False),
    ],
)
def test_supports(schema: Schema, command: str, members: list[str], *, supported: bool) -> None:
    assert schema.supports(command, *members) is supported


def test_events(schema: Schema) -> None:
    assert schema.has_event("STOP")
    assert not schema.has_event("chardev-add")


def test_a_qemu_without_replication_has_no_colo(schema: Schema) -> None:
    features = Features("7.2", schema)
    assert not features.colo
    assert not features.reconnect_ms
    assert features.to_json()["version"] == "7.2"
