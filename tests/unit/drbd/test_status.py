"""What DRBD prints, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.errors import UnderstudyError
from understudy_drbd.status import UNCONFIGURED, State, read_json, read_proc, version_of

# As printed by DRBD 8.4.11 (Linux 6.1).
PROC = """\
version: 8.4.11 (api:1/proto:86-101)
srcversion: 059B1B470318F053F5077D5 
 0: cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate C r-----
    ns:20480 nr:0 dw:20480 dr:0 al:14 bm:0 lo:0 pe:0 ua:0 ap:0 ep:1 wo:f oos:0
 1: cs:StandAlone ro:Primary/Unknown ds:UpToDate/DUnknown   r-----
    ns:0 nr:0 dw:1024 dr:0 al:9 bm:0 lo:0 pe:0 ua:0 ap:0 ep:1 wo:f oos:1024
 3: cs:Unconfigured
11: cs:SyncTarget ro:Secondary/Primary ds:Inconsistent/UpToDate C r-----
    ns:0 nr:53248 dw:73728 dr:0 al:14 bm:0 lo:0 pe:0 ua:0 ap:0 ep:1 wo:f oos:12248
	[================>...] sync'ed: 87.5% (12248/65496)K
	finish: 0:00:00 speed: 53,248 (53,248) want: 204,800 K/sec
"""  # noqa: W291


def nine(**changed: Any) -> list[dict[str, Any]]:
    """As described by DRBD 9's drbdsetup(8); its words, one resource with one peer."""
    peer = {"volume": 0, "replication-state": "Established", "peer-disk-state": "UpToDate", "out-of-sync": 0}
    connection = {
        "peer-node-id": 1,
        "name": "beta",
        "connection-state": "Connected",
        "peer-role": "Secondary",
        "peer_devices": [peer | changed.pop("peer", {})],
    }
    connections = changed.pop("connections", [connection | changed.pop("connection", {})])
    device = {"volume": 0, "minor": 5, "disk-state": "UpToDate"}
    return [{"name": "r0", "role": "Primary", "devices": [device], "connections": connections} | changed]


def test_a_mirror_in_version_8() -> None:
    state = read_proc(PROC, 0)
    assert state == State("Connected", "Primary", "Secondary", "UpToDate", "UpToDate", "C", 0)
    assert state.mirrored
    assert str(state) == "Connected Primary/Secondary UpToDate/UpToDate"


def test_no_connection_leaves_a_blank_for_the_protocol() -> None:
    assert read_proc(PROC, 1) == State(
        "StandAlone", "Primary", "Unknown", "UpToDate", "DUnknown", "", 1024 * 1024
    )


def test_a_synchronisation_is_no_mirror_and_its_progress_is_no_device() -> None:
    state = read_proc(PROC, 11)
    assert (state.connection, state.disk, state.peer_disk) == ("SyncTarget", "Inconsistent", "UpToDate")
    assert state.out_of_sync_bytes == 12248 * 1024
    assert not state.mirrored


@pytest.mark.parametrize("minor", [2, 3, 12])
def test_a_device_that_is_not_configured(minor: int) -> None:
    assert read_proc(PROC, minor) == UNCONFIGURED
    assert not read_proc(PROC, minor).mirrored


@pytest.mark.parametrize(
    ("connection", "disks"),
    [
        ("WFConnection", "UpToDate/UpToDate"),
        ("Connected", "UpToDate/Failed"),
        ("Connected", "Diskless/UpToDate"),
    ],
)
def test_what_is_no_mirror(connection: str, disks: str) -> None:
    line = f" 0: cs:{connection} ro:Primary/Secondary ds:{disks} C r-----\n"
    assert not read_proc(line, 0).mirrored


def test_the_version_of() -> None:
    assert version_of(PROC) == (8, 4, 11)
    assert version_of("version: 9.1.4 (api:2/proto:110-121)\n") == (9, 1, 4)
    with pytest.raises(UnderstudyError, match="tells no version"):
        version_of("")


def test_a_mirror_in_version_9() -> None:
    state = read_json(json.dumps(nine()), 5)
    assert state == State("Connected", "Primary", "Secondary", "UpToDate", "UpToDate")
    assert state.mirrored


def test_a_synchronisation_in_version_9() -> None:
    text = json.dumps(nine(peer={"replication-state": "SyncSource", "out-of-sync": 7}))
    state = read_json(text, 5)
    assert (state.connection, state.out_of_sync_bytes) == ("SyncSource", 7 * 1024)
    assert not state.mirrored


def test_connections_that_are_none_in_version_9() -> None:
    lost = read_json(json.dumps(nine(connection={"connection-state": "Connecting"})), 5)
    assert lost.connection == "Connecting"
    assert read_json(json.dumps(nine(connections=[])), 5).connection == "StandAlone"
    assert read_json(json.dumps(nine(connection={"peer_devices": []})), 5).peer_disk == "DUnknown"
    assert read_json(json.dumps(nine()), 6) == UNCONFIGURED
    assert read_json("", 5) == UNCONFIGURED


def test_several_peers_and_nonsense_are_said() -> None:
    [resource] = nine()
    several = json.dumps([resource | {"connections": resource["connections"] * 2}])
    with pytest.raises(UnderstudyError, match="r0 has 2 peers"):
        read_json(several, 5)
    for text in ("{", '["r0"]', '[{"name": "r0"}]'):
        with pytest.raises(UnderstudyError, match="makes no sense"):
            read_json(text, 5)
