"""DRBD's configuration, read and judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.device import ReplicationMode, Severity
from understudy.errors import UnderstudyError
from understudy_drbd.findings import of_configuration, of_pool, of_state, of_version, of_volume
from understudy_drbd.resource import Resource, resource_of
from understudy_drbd.status import UNCONFIGURED, State
from understudy_drbd.thin import NotThin, PoolState, read_pool_status

# As printed by drbdadm 9.22 for DRBD 8.4.
XML = """\
<config file="/etc/drbd.conf">
    <common>
        <section name="net">
            <option name="protocol" value="{protocol}"/>
            <option name="ping-timeout" value="5"/>
        </section>
        <section name="disk">
            <option name="al-extents" value="100"/>
        </section>
    </common>
    <resource name="r0" conf-file-line="/etc/drbd.conf:3">
        <host name="alpha">
            <volume vnr="0">
                <device minor="3"></device>
                <disk>/dev/mapper/pool-r0</disk>
                <meta-disk>{meta}</meta-disk>
            </volume>
            <address family="ipv4" port="7001">192.0.2.1</address>
        </host>
        <host name="beta">
            <volume vnr="0">
                <device minor="4"></device>
                <disk>/dev/vg/r0</disk>
                <meta-disk>internal</meta-disk>
            </volume>
            <address family="ipv4" port="7001">192.0.2.2</address>
        </host>
        <section name="disk">
            <option name="al-extents" value="2"/>
        </section>
        {more}
    </resource>
</config>
"""
UP = State("Connected", "Primary", "Secondary", "UpToDate", "UpToDate", "C")


def resource(more: str = "", *, protocol: str = "C", meta: str = "internal", host: str = "alpha") -> Resource:
    found = resource_of(
        XML.format(more=more, protocol=protocol, meta=meta), host, {"alpha": 3}.get(host[:5], 4)
    )
    assert found is not None
    return found


def section(name: str, option: str, value: str) -> str:
    return f'<section name="{name}"><option name="{option}" value="{value}"/></section>'


def problems(more: str = "", *, protocol: str = "C", meta: str = "internal") -> list[str]:
    return [str(each) for each in of_configuration("disk0", resource(more, protocol=protocol, meta=meta))]


def test_a_host_finds_its_own_half() -> None:
    ours, theirs = resource(), resource(host="beta")
    assert (ours.name, ours.disk, ours.minor) == ("r0", Path("/dev/mapper/pool-r0"), 3)
    assert (theirs.disk, theirs.minor) == (Path("/dev/vg/r0"), 4)
    assert (ours.volumes, ours.peers, ours.internal) == (1, 1, True)
    assert resource(host="alpha.example.org").disk == ours.disk


def test_a_device_or_host_that_is_not_configured() -> None:
    text = XML.format(more="", protocol="C", meta="internal")
    assert resource_of(text, "alpha", 4) is None
    assert resource_of(text, "gamma", 3) is None
    with pytest.raises(UnderstudyError, match="cannot be read"):
        resource_of("<config", "alpha", 3)


def test_the_special_goes_before_the_general_and_both_before_the_default() -> None:
    made = resource()
    assert made.option("disk", "al-extents") == "2"
    assert made.option("net", "ping-timeout") == "5"
    assert made.option("net", "after-sb-0pri") == "disconnect"
    assert made.option("net", "unheard-of") == ""


def test_the_log_covers_what_fits_into_it() -> None:
    assert resource().log_covers(8 << 20)
    assert not resource().log_covers((8 << 20) + 512)


def test_a_plain_configuration_is_fine() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("more", "problem", "remedy"),
    [
        (section("net", "allow-two-primaries", "yes"), "allows two primaries", "remove allow-two-primaries"),
        (section("disk", "fencing", "resource-only"), "fencing resource-only", "set fencing dont-care"),
        (section("net", "fencing", "resource-and-stonith"), "fencing resource-and-stonith", "dont-care"),
        (section("options", "quorum", "majority"), "quorum majority", "set quorum off"),
        (
            section("net", "after-sb-1pri", "discard-secondary"),
            "after-sb-1pri discard-secondary",
            "disconnect",
        ),
        (section("net", "after-sb-2pri", "call-pri-lost-after-sb"), "settles a split brain", "after-sb-2pri"),
    ],
)
def test_what_contradicts_the_arbiter_is_an_error(more: str, problem: str, remedy: str) -> None:
    [found] = problems(more)
    assert found.startswith("error: disk0: DRBD resource r0 ")
    assert problem in found
    assert remedy in found.partition("To do:")[2]


def test_what_does_not_fit_is_an_error() -> None:
    [protocol] = problems(protocol="A")
    assert "uses protocol A" in protocol
    [metadata] = problems(meta="/dev/sdb1 [0]")
    assert "does not go back in time" in metadata
    several = resource_of(
        XML.format(more="", protocol="C", meta="internal").replace(
            "</volume>", '</volume><volume vnr="1"><device minor="9"/></volume><!-- -->', 1
        ),
        "alpha",
        3,
    )
    assert several is not None
    [volumes] = [str(each) for each in of_configuration("disk0", several)]
    assert "has 2 volumes" in volumes


def test_a_handler_that_ends_the_host_is_a_warning() -> None:
    more = section("handlers", "pri-lost-after-sb", "notify.sh; echo b > /proc/sysrq-trigger")
    [found] = problems(more)
    assert found.startswith("warning: ")
    assert "pri-lost-after-sb" in found
    assert problems(section("handlers", "split-brain", "notify-split-brain.sh root")) == []


@pytest.mark.parametrize(
    ("state", "remedy"),
    [
        (UNCONFIGURED, "drbdadm up r0"),
        (State("StandAlone", "Primary"), "drbdadm connect r0"),
        (State("WFConnection", "Primary"), "on the other host"),
        (State("Connecting", "Primary"), "on the other host"),
        (State("SyncSource", "Primary"), "wait"),
        (State("Connected", "Primary", "Secondary", "UpToDate", "Failed"), "drbdadm status r0"),
    ],
)
def test_a_mirror_that_is_not_whole_is_an_error_with_a_way_out(state: State, remedy: str) -> None:
    [found] = of_state("disk0", resource(), state, ReplicationMode.PRIMARY)
    assert found.severity is Severity.ERROR
    assert state.connection in found.problem
    assert remedy in found.remedy


def test_a_drbd_that_has_not_been_tried_is_a_warning() -> None:
    assert not list(of_version("disk0", (8, 4, 11)))
    [found] = of_version("disk0", (9, 1, 4))
    assert found.severity is Severity.WARNING
    assert "DRBD 9.1.4" in found.problem


def test_the_roles_are_the_sides() -> None:
    assert not list(of_state("disk0", resource(), UP, ReplicationMode.PRIMARY))
    [found] = of_state("disk0", resource(), UP, ReplicationMode.SECONDARY)
    assert "is Primary here" in found.problem
    assert "drbdadm secondary r0" in found.remedy


def test_a_disk_that_cannot_be_rolled_back_says_what_would() -> None:
    reason = NotThin(Path("/dev/sdb1"), "it is no device of the device mapper")
    [error] = of_volume("disk0", resource(), reason, ReplicationMode.SECONDARY)
    assert error.severity is Severity.ERROR
    assert "/dev/sdb1 cannot be rolled back" in error.problem
    assert "lvcreate --thin" in error.remedy
    [warning] = of_volume("disk0", resource(), reason, ReplicationMode.PRIMARY)
    assert warning.severity is Severity.WARNING
    assert "After a failover" in warning.problem


@pytest.mark.parametrize(
    ("text", "trouble", "severity"),
    [
        ("0 22/4161600 10/1000 - rw no_discard_passdown queue_if_no_space - 1024", "", None),
        ("0 22/4161600 850/1000 - rw no_discard_passdown queue_if_no_space - 1024", "", Severity.WARNING),
        ("0 4000000/4161600 10/1000 - rw no_discard_passdown queue_if_no_space - 1024", "", Severity.WARNING),
        ("0 22/4161600 1000/1000 - out_of_data_space discard_passdown", "out of data space", Severity.ERROR),
        ("0 22/4161600 10/1000 - ro discard_passdown", "takes no writes (ro)", Severity.ERROR),
        ("0 22/4161600 10/1000 - ro discard_passdown queue_if_no_space needs_check", "check", Severity.ERROR),
        ("Fail", "failed", Severity.ERROR),
        ("Error", "failed", Severity.ERROR),
    ],
)
def test_a_pool_is_judged_by_its_own_words(text: str, trouble: str, severity: Severity | None) -> None:
    state = read_pool_status(text)
    assert trouble in state.trouble
    assert state.writable is not bool(state.trouble)
    assert [each.severity for each in of_pool("disk0", state)] == ([severity] if severity else [])


def test_a_pool_that_talks_nonsense() -> None:
    with pytest.raises(UnderstudyError, match="makes no sense"):
        read_pool_status("what")
    assert PoolState(1, 4, 3, 4, writable=True, trouble="").fill_ratio == 0.75


# As printed by drbdadm of DRBD 8.3.
XML_8_3 = """\
<config file="/etc/drbd.conf">
    <common>
        <section name="syncer">
            <option name="rate" value="10M"/>
        </section>
    </common>
    <resource name="r0" protocol="D">
        <host name="alpha">
            <device minor="2">/dev/drbd2</device>
            <disk>/dev/sda9</disk>
            <address family="ipv4" port="7001">192.0.2.1</address>
            <meta-disk>internal</meta-disk>
        </host>
        <host name="beta">
            <device minor="2">/dev/drbd2</device>
            <disk>/dev/sda9</disk>
            <address family="ipv4" port="7002">192.0.2.2</address>
            <meta-disk>internal</meta-disk>
        </host>
    </resource>
</config>
"""


def test_the_configuration_of_version_8_3() -> None:
    found = resource_of(XML_8_3, "alpha", 2)
    assert found is not None
    assert (found.name, found.disk, found.volumes, found.peers) == ("r0", Path("/dev/sda9"), 1, 1)
    assert found.option("net", "protocol") == "D"
    assert resource_of(XML_8_3, "alpha", 3) is None
