"""hotplug/remus-netbuf-setup over a faked host: done or as before, whatever fails and wherever.

tests/kernel/test_hotplug_scripts.py asks the same of a real kernel.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hotplug.scripts import FAKES, Ended, Fault, Scripts

SCRIPT = "remus-netbuf-setup"
XENBUS_PATH = "/libxl/3/remus/netbuf/0"
COMPLETE = {
    "remus7/ifb": "",
    "remus7/alias": "remus-netbuf:vif3.0",
    "remus7/addrgenmode": "",
    "remus7/root": "10000000",
    "remus7/up": "",
    "vif3.0/ingress": "ingress",
    "vif3.0/filter": "matchall remus7",
}
#: What may fail without a loss: another command follows that knows better, or does the same.
SPARED = re.compile(r"modprobe |ip link set dev remus7 addrgenmode |tc filter add .* matchall |xenstore-rm ")
CHANGES = re.compile(r"modprobe|ip link (add|set|del)|tc \w+ (add|del|change|replace)")
ASKS = re.compile(r"awk |ip -o |tc \w+ show |xenstore-exists ")


class Host:
    """A faked host with the interfaces of two guests."""

    def __init__(self, directory: Path, *, xenstore: bool) -> None:
        self.state = directory / "host"
        self._next = self.state / "next"
        self.links = self.state / "links"
        self.links.mkdir(parents=True)
        self._next.write_text("9\n")
        for name, ifindex in (("vif3.0", 7), ("vif4.0", 8)):
            (self.links / name).mkdir()
            (self.links / name / "ifindex").write_text(f"{ifindex}\n")
            (self.links / name / "up").touch()
            (self.links / name / "peer").touch()
        env = {"FAKE_HOST": str(self.state), "vifname": "vif3.0"}
        self.scripts = Scripts(directory, FAKES, env | ({"XENBUS_PATH": XENBUS_PATH} if xenstore else {}))
        self._first = self.look()

    def look(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.links)): path.read_text().strip()
            for path in self.links.rglob("*")
            if path.is_file() and not (path.name == "ifindex" and path.parent.name.startswith("remus"))
        }

    def changes(self) -> dict[str, str]:
        """Return what is there that was not there at first; nothing of the first may be gone."""
        now = self.look()
        assert self._first.items() <= now.items()
        return {name: text for name, text in now.items() if name not in self._first}

    def set(self, path: str, text: str = "") -> None:
        (self.links / path).parent.mkdir(exist_ok=True)
        (self.links / path).write_text(f"{text}\n")

    def store(self) -> dict[str, str]:
        directory = Path(f"{self.state}/store{XENBUS_PATH}")
        return (
            {path.name: path.read_text().strip() for path in directory.iterdir()}
            if directory.exists()
            else {}
        )

    def results(self, ended: Ended) -> dict[str, str]:
        """Return the results, from wherever they went."""
        if "XENBUS_PATH" not in self.scripts.env:
            return dict(ended.results)
        assert ended.results == {}
        return self.store()


@pytest.fixture(params=[False, True], ids=["stdout", "xenstore"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return Host(tmp_path, xenstore=request.param)


@pytest.fixture
def xen_host(tmp_path: Path) -> Host:
    return Host(tmp_path, xenstore=True)


@pytest.fixture
def plain_host(tmp_path: Path) -> Host:
    return Host(tmp_path, xenstore=False)


def done(calls: tuple[str, ...]) -> list[str]:
    return [call for call in calls if CHANGES.match(call)]


def test_setup_makes_the_buffer_and_reports_it(host: Host) -> None:
    ended = host.scripts.run(SCRIPT, "setup")
    assert (ended.status, ended.stderr) == (0, "")
    assert host.results(ended) == {"ifb": "remus7", "hotplug-status": "connected"}
    assert host.changes() == COMPLETE


def test_it_reports_the_ifb_before_it_makes_it_and_captures_last(host: Host) -> None:
    ended = host.scripts.run(SCRIPT, "setup")
    changes = done(ended.calls)
    assert changes[1] == "ip link add name remus7 txqueuelen 10000 type ifb"
    assert changes[-1].startswith("tc filter add dev vif3.0 parent ffff: protocol all ")
    if "XENBUS_PATH" in host.scripts.env:
        assert ended.calls.index(f"xenstore-write {XENBUS_PATH}/ifb remus7") < ended.calls.index(changes[0])


def test_a_second_setup_changes_nothing(host: Host) -> None:
    host.scripts.run(SCRIPT, "setup")
    again = host.scripts.run(SCRIPT, "setup")
    assert again.status == 0
    assert host.results(again) == {"ifb": "remus7", "hotplug-status": "connected"}
    assert [call for call in done(again.calls) if " alias " not in call and " addrgenmode " not in call] == []
    assert host.changes() == COMPLETE


def test_teardown_leaves_nothing_twice(host: Host) -> None:
    host.scripts.run(SCRIPT, "setup")
    for _ in range(2):
        ended = host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus7"})
        assert (ended.status, host.results(ended), host.changes(), host.store()) == (0, {}, {}, {})


def test_teardown_of_what_never_was_is_done(host: Host) -> None:
    assert host.scripts.run(SCRIPT, "teardown").status == 0
    assert host.changes() == {}


def test_the_guest_is_opened_before_its_ifb_goes(plain_host: Host) -> None:
    plain_host.scripts.run(SCRIPT, "setup")
    ended = plain_host.scripts.run(SCRIPT, "teardown")
    assert done(ended.calls) == ["tc qdisc del dev vif3.0 ingress", "ip link del dev remus7"]


def _recorded(host: Host, action: str) -> tuple[str, ...]:
    """Run `action` undisturbed, return its calls, and put the host back to where it was."""
    ended = host.scripts.run(SCRIPT, action)
    assert ended.status == 0
    host.scripts.run(SCRIPT, "teardown" if action == "setup" else "setup")
    return ended.calls


def _points(calls: tuple[str, ...], fault: Fault) -> list[tuple[int, str]]:
    """Return where `fault` can make a difference: what only asks can fail, and that is all."""
    return [(at, call) for at, call in enumerate(calls, 1) if fault is Fault.REFUSES or not ASKS.match(call)]


def _first_word(host: Host, ended: Ended, at: str) -> None:
    """The first failure is what is told, in a line."""
    results = host.results(ended)
    if not at.startswith("xenstore-write"):  # then the results cannot be handed over
        assert results["hotplug-status"] == "error", at
        assert results["hotplug-error"] in ended.stderr, at
    assert ended.stderr.strip(), at


@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.LIES, Fault.ENDED], ids=lambda fault: fault.name)
def test_setup_that_fails_anywhere_takes_everything_back(xen_host: Host, fault: Fault) -> None:
    calls = _recorded(xen_host, "setup")
    assert len(done(calls)) == 8
    for at, call in _points(calls, fault):
        ended = xen_host.scripts.run(SCRIPT, "setup", fault=fault, at=at)
        assert ended.calls[at - 1] == call
        if ended.status == 0:
            assert SPARED.match(call), f"{call} {fault.value}, and setup does not mind"
            xen_host.scripts.run(SCRIPT, "teardown")
        else:
            assert ended.status == 2, (call, ended)
            _first_word(xen_host, ended, call)
        assert xen_host.changes() == {}, (call, ended)


def test_setup_whose_taking_back_fails_too_says_so_and_leaves_the_rest_to_teardown(xen_host: Host) -> None:
    left: set[str] = set()
    for at, call in _points(_recorded(xen_host, "setup"), Fault.BREAKS):
        ended = xen_host.scripts.run(SCRIPT, "setup", fault=Fault.BREAKS, at=at)
        assert ended.status == (3 if xen_host.changes() else 2) or (
            # It could not see any more that there is nothing to take back.
            ended.status == 3 and call.startswith(("ip link add", "modprobe"))
        ), (call, ended)
        assert ended.status == 2 or "teardown is needed" in ended.stderr
        left |= xen_host.changes().keys()
        assert xen_host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus7"}).status == 0
        assert xen_host.changes() == {}, call
    assert left == COMPLETE.keys()


@pytest.mark.parametrize("then", ["setup", "teardown"])
def test_setup_killed_anywhere_is_finished_or_undone(xen_host: Host, then: str) -> None:
    for at, call in _points(_recorded(xen_host, "setup"), Fault.KILLED):
        assert xen_host.scripts.run(SCRIPT, "setup", fault=Fault.KILLED, at=at).status == -9
        assert xen_host.scripts.run(SCRIPT, then).status == 0, call
        assert xen_host.changes() == (COMPLETE if then == "setup" else {}), call
        xen_host.scripts.run(SCRIPT, "teardown")


@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.LIES], ids=lambda fault: fault.name)
def test_a_second_setup_that_fails_leaves_the_first_as_it_is(xen_host: Host, fault: Fault) -> None:
    xen_host.scripts.run(SCRIPT, "setup")
    for at, call in _points(xen_host.scripts.run(SCRIPT, "setup").calls, fault):
        ended = xen_host.scripts.run(SCRIPT, "setup", fault=fault, at=at)
        assert ended.status == 2 or SPARED.match(call), (call, ended)
        assert xen_host.changes() == COMPLETE, call


@pytest.mark.parametrize(
    "fault", [Fault.REFUSES, Fault.LIES, Fault.BREAKS, Fault.KILLED], ids=lambda fault: fault.name
)
def test_teardown_that_fails_anywhere_is_done_by_the_next(xen_host: Host, fault: Fault) -> None:
    xen_host.scripts.run(SCRIPT, "setup")
    for at, call in _points(_recorded(xen_host, "teardown"), fault):
        ended = xen_host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus7"}, fault=fault, at=at)
        assert ended.status != 0 or SPARED.match(call), (call, ended)
        # Never a redirect to an ifb that is gone: the guest would be mute.
        assert "remus7/ifb" in xen_host.changes() or "vif3.0/filter" not in xen_host.changes()
        assert xen_host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus7"}).status == 0, call
        assert (xen_host.changes(), xen_host.store()) == ({}, {}), call
        xen_host.scripts.run(SCRIPT, "setup")


def test_without_matchall_it_captures_with_u32(plain_host: Host) -> None:
    calls = _recorded(plain_host, "setup")
    at = next(at for at, call in enumerate(calls, 1) if " matchall " in call)
    assert plain_host.scripts.run(SCRIPT, "setup", at=at).status == 0
    assert plain_host.changes() == COMPLETE | {"vif3.0/filter": "u32 remus7"}


def test_a_limit_is_handed_on(plain_host: Host) -> None:
    assert plain_host.scripts.run(SCRIPT, "setup", env={"REMUS_LIMIT_BYTES": "4096"}).status == 0
    assert plain_host.changes()["remus7/root"] == "4096"


@pytest.mark.parametrize(
    ("lost", "restored"),
    [
        ("remus7/root", "10000000"),
        ("remus7/up", ""),
        ("vif3.0/filter", "matchall remus7"),
        ("remus7/alias", ""),
    ],
)
def test_setup_makes_good_what_is_missing(plain_host: Host, lost: str, restored: str) -> None:
    plain_host.scripts.run(SCRIPT, "setup")
    (plain_host.links / lost).unlink()
    assert plain_host.scripts.run(SCRIPT, "setup").status == 0
    assert plain_host.changes() == COMPLETE | ({lost: restored} if restored else {})


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
@pytest.mark.parametrize("redirect", ["", "matchall vif4.0"])
def test_an_ingress_qdisc_of_somebody_else_is_refused_and_left_alone(
    plain_host: Host, kind: str, redirect: str
) -> None:
    plain_host.set("vif3.0/ingress", kind)
    if redirect:
        plain_host.set("vif3.0/filter", redirect)
    before = plain_host.changes()
    ended = plain_host.scripts.run(SCRIPT, "setup")
    assert ended.status == 2
    assert "already" in ended.results["hotplug-error"]
    assert plain_host.scripts.run(SCRIPT, "teardown").status == 0
    assert plain_host.changes() == before


def test_a_redirect_to_nowhere_wants_a_teardown(plain_host: Host) -> None:
    plain_host.set("vif3.0/ingress", "ingress")
    plain_host.set("vif3.0/filter", "matchall remus7")
    ended = plain_host.scripts.run(SCRIPT, "setup")
    assert "call teardown first" in ended.results["hotplug-error"]
    assert plain_host.scripts.run(SCRIPT, "teardown").status == 0
    assert plain_host.changes() == {}


def test_the_ifb_of_another_guest_is_never_touched(plain_host: Host) -> None:
    plain_host.scripts.run(SCRIPT, "setup", env={"vifname": "vif4.0"})
    before = plain_host.changes()
    assert before["vif4.0/filter"] == "matchall remus8"
    plain_host.scripts.run(SCRIPT, "setup")
    assert plain_host.changes() == before | COMPLETE
    plain_host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus8"})
    assert plain_host.changes() == before


def test_an_interface_that_only_has_our_name_is_not_taken(plain_host: Host) -> None:
    plain_host.set("remus7/ifindex", "9")
    plain_host.set("remus7/mine")
    ended = plain_host.scripts.run(SCRIPT, "setup")
    assert ended.status == 2
    assert "File exists" in ended.results["hotplug-error"]
    plain_host.scripts.run(SCRIPT, "teardown", env={"REMUS_IFB": "remus7"})
    assert plain_host.changes() == {"remus7/mine": ""}


def test_teardown_finds_the_ifb_of_an_interface_that_is_gone(plain_host: Host) -> None:
    plain_host.scripts.run(SCRIPT, "setup")
    for path in (plain_host.links / "vif3.0").iterdir():
        path.unlink()
    (plain_host.links / "vif3.0").rmdir()
    assert plain_host.scripts.run(SCRIPT, "teardown").status == 0
    assert not (plain_host.links / "remus7").exists()


@pytest.mark.parametrize(
    ("arguments", "env", "word"),
    [
        ([], {}, "usage"),
        (["stop"], {}, "usage"),
        (["setup", "now"], {}, "usage"),
        (["setup"], {"vifname": ""}, "vifname"),
        (["setup"], {"vifname": "../../etc"}, "vifname"),
        (["teardown"], {"vifname": "a b"}, "vifname"),
        (["setup"], {"vifname": "sixteen-letters-"}, "vifname"),
        (["setup"], {"vifname": "vif9.0"}, "no interface vif9.0"),
        (["setup"], {"REMUS_LIMIT_BYTES": "10M"}, "REMUS_LIMIT_BYTES"),
        (["setup"], {"REMUS_LIMIT_BYTES": "0"}, "REMUS_LIMIT_BYTES"),
    ],
)
def test_what_it_cannot_do_it_says(
    plain_host: Host, arguments: list[str], env: dict[str, str], word: str
) -> None:
    ended = plain_host.scripts.run(SCRIPT, *arguments, env=env)
    assert ended.status == 2
    assert word in ended.results["hotplug-error"]
    assert plain_host.changes() == {}


def test_an_old_error_is_gone_after_success(tmp_path: Path) -> None:
    host = Host(tmp_path, xenstore=True)
    host.scripts.run(SCRIPT, "setup", env={"REMUS_LIMIT_BYTES": "0"})
    assert host.store()["hotplug-status"] == "error"
    host.scripts.run(SCRIPT, "setup")
    assert host.store() == {"ifb": "remus7", "hotplug-status": "connected"}


def test_several_at_once_all_succeed(plain_host: Host) -> None:
    vifs = ["vif3.0", "vif4.0", "vif3.0", "vif4.0"]
    running = [plain_host.scripts.start(SCRIPT, "setup", env={"vifname": vif}) for vif in vifs]
    said = [process.communicate(timeout=30) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0], said
    changes = plain_host.changes()
    assert (changes["vif3.0/filter"], changes["vif4.0/filter"]) == ("matchall remus7", "matchall remus8")


def test_it_waits_for_the_lock_and_not_for_ever(plain_host: Host, tmp_path: Path) -> None:
    """Another one's flock(1) that does not come back stands for one that holds the lock too long."""
    calls = _recorded(plain_host, "setup")
    at = next(at for at, call in enumerate(calls, 1) if call.startswith("flock"))
    assert calls[at - 1] == "flock -w 10 9"
    ended = plain_host.scripts.run(SCRIPT, "setup", at=at)
    assert "has held" in ended.results["hotplug-error"]
