"""hotplug/block-drbd-probe: not DRBD, usable, and DRBD but not usable are three different answers.

What drbdsetup says here is what drbd-utils 9.22 said on a DRBD 8.4.11 kernel, and, for version 9, what its manual
describes (drbdsetup-9.0(8), events2). tests/kernel/test_hotplug_scripts.py asks real devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hotplug.scripts import FAKES, NEVER, Ended, Fault, Scripts

EVENTS_84 = """\
exists resource name:r0 role:Primary suspended:no
exists connection name:r0 peer-node-id:0 conn-name:peer connection:Connected role:Secondary
exists device name:r0 volume:0 minor:300 disk:UpToDate
exists peer-device name:r0 peer-node-id:0 conn-name:peer volume:0 replication:Established peer-disk:UpToDate \
resync-suspended:no
exists resource name:other role:Secondary suspended:user
exists connection name:other peer-node-id:0 connection:StandAlone role:Unknown
exists device name:other volume:0 minor:1 disk:Diskless
exists peer-device name:other peer-node-id:0 volume:0 replication:Off peer-disk:DUnknown resync-suspended:no
exists -
"""
EVENTS_9 = """\
exists resource name:r0 role:Primary suspended:no force-io-failures:no may_promote:no promotion_score:10101
exists connection name:r0 peer-node-id:1 conn-name:beta connection:Connected role:Secondary tls:no
exists connection name:r0 peer-node-id:2 conn-name:gamma connection:Connected role:Secondary tls:no
exists device name:r0 volume:0 minor:300 backing_dev:/dev/vg/r0 disk:UpToDate client:no quorum:yes
exists device name:r0 volume:1 minor:301 backing_dev:/dev/vg/r1 disk:Inconsistent client:no quorum:yes
exists path name:r0 peer-node-id:1 conn-name:beta local:ipv4:10.0.0.1:7000 peer:ipv4:10.0.0.2:7000 established:yes
exists peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:Established peer-disk:UpToDate
exists peer-device name:r0 peer-node-id:2 conn-name:gamma volume:0 replication:Established peer-disk:UpToDate
exists peer-device name:r0 peer-node-id:1 conn-name:beta volume:1 replication:SyncSource peer-disk:Inconsistent
exists -
"""
SHOW = "resource r0 {\n    net {\n        protocol        \tC; # default\n        timeout         \t60;\n    }\n}\n"
NOT_DRBD, UNKNOWN, PROTOCOL, UNUSABLE = 1, 2, 3, 4


class Host:
    """A host where DRBD's minor 300 exists, as the file `device`, and says what the test wants."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "host"
        (self.state / "drbd").mkdir(parents=True)
        self.device = directory / "device"
        self.device.touch()
        self.says("device", "93:12c:block special file")  # 147, 300
        self.says("events", EVENTS_84)
        self.says("show", SHOW)
        self.scripts = Scripts(directory, FAKES, {"FAKE_HOST": str(self.state)})

    def says(self, what: str, text: str) -> None:
        (self.state / "drbd" / what).write_text(text)

    def probe(self, *arguments: str, fault: Fault = Fault.REFUSES, at: int = NEVER) -> Ended:
        return self.scripts.run("block-drbd-probe", *(arguments or [str(self.device)]), fault=fault, at=at)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("events", [EVENTS_84, EVENTS_9], ids=["8.4", "9"])
def test_a_healthy_device_is_usable(host: Host, events: str) -> None:
    host.says("events", events)
    ended = host.probe()
    assert (ended.status, ended.results, ended.stderr) == (0, {}, "")


def test_a_secondarys_device_is_usable(host: Host) -> None:
    host.says(
        "events",
        EVENTS_84.replace("role:Secondary", "role:X").replace("r0 role:Primary", "r0 role:Secondary"),
    )
    assert host.probe().status == 0


def test_it_asks_and_changes_nothing(host: Host) -> None:
    asked = [call for call in host.probe().calls if not call.startswith("awk")]
    assert asked == [
        f"stat -L -c %t:%T:%F -- {host.device}",
        "drbdsetup events2 --now",
        "drbdsetup show r0 --show-defaults",
    ]


@pytest.mark.parametrize(
    "kind", ["7:0:block special file", "0:0:regular file", "93:0:character special file"]
)
def test_what_is_not_drbd_is_declined(host: Host, kind: str) -> None:
    host.says("device", kind)
    ended = host.probe()
    assert ended.status == NOT_DRBD
    assert kind.rsplit(":", maxsplit=1)[-1] in ended.stderr


def test_what_does_not_exist_is_declined_unless_its_name_is_drbds(host: Host) -> None:
    assert host.probe("/nowhere/disk.img").status == NOT_DRBD
    ended = host.probe("/dev/drbd/by-res/nowhere/0")
    assert ended.status == UNUSABLE
    assert "does not exist" in ended.stderr


REASONS = [
    ("connection:Connected", "connection:Connecting", "connection to the peer is Connecting"),
    ("suspended:no", "suspended:user", "I/O is suspended (user)"),
    (" disk:UpToDate", " disk:Inconsistent", "disk on this host is Inconsistent"),
    ("peer-disk:UpToDate", "peer-disk:DUnknown", "disk on the peer is DUnknown"),
    ("replication:Established", "replication:SyncSource", "replication is SyncSource"),
    ("role:Secondary", "role:Primary", "sides are Primary"),
    ("minor:300", "minor:30", "its resource is not up"),
]


@pytest.mark.parametrize("events", [EVENTS_84, EVENTS_9], ids=["8.4", "9"])
@pytest.mark.parametrize(("field", "value", "reason"), REASONS, ids=[value for _, value, _ in REASONS])
def test_a_device_that_cannot_be_used_is_an_error_with_its_reason(
    host: Host, events: str, field: str, value: str, reason: str
) -> None:
    assert field in events
    host.says("events", events.replace(field, value))
    ended = host.probe()
    assert (ended.status, ended.results) == (UNUSABLE, {})
    assert reason in ended.stderr
    assert "not usable" in ended.stderr


def test_every_peer_counts(host: Host) -> None:
    host.says("events", EVENTS_9.replace("gamma connection:Connected", "gamma connection:Connecting"))
    assert host.probe().status == UNUSABLE


def test_without_a_peer_it_is_not_usable(host: Host) -> None:
    host.says("events", "".join(line for line in EVENTS_9.splitlines(keepends=True) if "peer" not in line))
    ended = host.probe()
    assert ended.status == UNUSABLE
    assert "there is no connection to the peer" in ended.stderr


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_another_protocol_is_an_error_of_its_own(host: Host, protocol: str) -> None:
    host.says("show", SHOW.replace("C;", f"{protocol};"))
    ended = host.probe()
    assert ended.status == PROTOCOL
    assert f"its protocol is {protocol}, not C" in ended.stderr


@pytest.mark.parametrize(
    ("what", "text"),
    [("events", ""), ("events", EVENTS_84.replace("exists -\n", "")), ("show", "resource r0 {\n}\n")],
)
def test_an_answer_that_is_not_understood_is_no_answer(host: Host, what: str, text: str) -> None:
    host.says(what, text)
    assert host.probe().status == UNKNOWN


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
def test_a_command_that_fails_never_makes_it_usable_or_somebody_elses(host: Host, fault: Fault) -> None:
    for at, call in enumerate(host.probe().calls, 1):
        ended = host.probe(fault=fault, at=at)
        assert ended.status not in {0, NOT_DRBD}, (call, ended)
        assert ended.status < 0 or ended.stderr, call


@pytest.mark.parametrize("arguments", [("a", "b"), ("",)])
def test_it_wants_one_device(host: Host, arguments: tuple[str, ...]) -> None:
    ended = host.probe(*arguments)
    assert ended.status == UNKNOWN
    assert "usage" in ended.stderr
