"""hotplug/vif-understudy over a faked host: on the bridge or down and off it, whatever fails, and nothing executed.

tests/xen/test_vif_script.py asks the same of a real Xen host.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hotplug.scripts import FAKES, Ended, Fault, Scripts

SCRIPT = "vif-understudy"
BACKEND = "backend/vif/3/0"
FRONTEND = "/local/domain/3/device/vif/0"
ADDRESS = "fe:ff:ff:ff:ff:ff"
AGAIN = "master xenbr0 up"  # neither name nor address can be changed of one that is up
SET = f"address {ADDRESS} {AGAIN}"
READ = f"xenstore-ls {BACKEND}"
CONNECT = f"xenstore-write {FRONTEND}/mtu 1500 {BACKEND}/hotplug-status connected"


class Host:
    """A faked Xen host: two bridges, the vif and the tap of one guest, the vif of another."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "host"
        self._links = self.state / "links"
        self._devices = self.state / "sys" / "bus" / "xen-backend" / "devices"
        for name in ("vif3.0", "vif3.0-emu", "vif4.0", "xenbr0", "jumbo0"):
            (self._links / name).mkdir(parents=True)
        for name, mtu in (("xenbr0", 1500), ("jumbo0", 9000)):
            (self._links / name / "bridge").touch()
            (self._links / name / "mtu").write_text(f"{mtu}\n")
        for domid in (3, 4):
            (self._devices / f"vif-{domid}-0" / "net" / f"vif{domid}.0").mkdir(parents=True)
        (self.state / "sys" / "class").mkdir()
        (self.state / "sys" / "class" / "net").symlink_to(self._links)
        self.keep(bridge="xenbr0", frontend=FRONTEND, script="/etc/xen/scripts/vif-understudy", handle="0")
        self.scripts = Scripts(
            directory,
            FAKES,
            {
                "FAKE_HOST": str(self.state),
                "UNDERSTUDY_SYS": str(self.state / "sys"),
                "XENBUS_PATH": BACKEND,
                "vif": "vif3.0",
                "INTERFACE": "vif3.0-emu",
            },
        )

    def keep(self, **keys: str) -> None:
        """Put keys of the backend into xenstore."""
        directory = self.state / "store" / "local/domain/0" / BACKEND
        directory.mkdir(parents=True, exist_ok=True)
        for key, value in keys.items():
            (directory / key).write_text(f"{value}\n")

    def told(self, key: str) -> str:
        """Return what xenstore says of the backend."""
        path = self.state / "store" / "local/domain/0" / BACKEND / key
        return path.read_text().strip() if path.exists() else ""

    def frontend_mtu(self) -> str:
        path = Path(f"{self.state}/store{FRONTEND}/mtu")
        return path.read_text().strip() if path.exists() else ""

    def link(self, name: str) -> dict[str, str]:
        """Return what was set of an interface."""
        return {path.name: path.read_text().strip() for path in (self._links / name).iterdir()}

    def links(self) -> set[str]:
        return {path.name for path in self._links.iterdir()}

    def online(self, *, fault: Fault = Fault.REFUSES, at: int = 1_000_000) -> Ended:
        return self.scripts.run(SCRIPT, "online", "type_if=vif", fault=fault, at=at)

    def offline(self, *, fault: Fault = Fault.REFUSES, at: int = 1_000_000) -> Ended:
        return self.scripts.run(SCRIPT, "offline", "type_if=vif", fault=fault, at=at)

    def remove(self, name: str) -> None:
        """Let an interface go, as it does with its domain."""
        for path in [*(self._links / name).iterdir(), self._links / name]:
            path.rmdir() if path.is_dir() else path.unlink()
        for path in self._devices.glob(f"*/net/{name}"):
            path.rmdir()


UP = {"master": "xenbr0", "up": "", "mtu": "1500", "address": ADDRESS}


def is_cut_off(link: dict[str, str]) -> bool:
    return "up" not in link and "master" not in link


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- What libxl calls ------------------------------------------------------------------------------------------------


def test_a_vif_comes_up_by_three_commands_and_again_by_the_same(host: Host) -> None:
    for set_ in (SET, AGAIN):
        ended = host.online()
        assert (ended.status, ended.stderr, ended.results) == (0, "", {})
        assert ended.calls == (READ, f"ip link set dev vif3.0 mtu 1500 {set_}", CONNECT)
        assert host.link("vif3.0") == UP
        assert (host.told("hotplug-status"), host.frontend_mtu()) == ("connected", "1500")


def test_it_needs_no_command_but_those(tmp_path: Path) -> None:
    """What it calls besides would not be found, and be told on standard error."""
    host = Host(tmp_path)
    wrappers = host.scripts.env["PATH"].split(":")[0]
    ended = host.scripts.run(SCRIPT, "online", "type_if=vif", env={"PATH": wrappers})
    assert (ended.status, ended.stderr, len(ended.calls)) == (0, "", 3)


def test_a_vif_goes_down_and_off_its_bridge_and_again_and_when_it_is_gone(host: Host) -> None:
    host.online()
    for _ in range(2):
        ended = host.offline()
        assert (ended.status, ended.stderr) == (0, "")
        assert ended.calls == ("ip link set dev vif3.0 nomaster down",)
        assert is_cut_off(host.link("vif3.0"))
    host.remove("vif3.0")
    ended = host.offline()
    assert (ended.status, ended.stderr, host.told("hotplug-error")) == (0, "", "")


def test_the_tap_of_an_emulated_card_follows_its_vif(host: Host) -> None:
    host.online()
    added = host.scripts.run(SCRIPT, "add", "type_if=tap")
    assert (added.status, added.stderr) == (0, "")
    assert added.calls == (READ, f"ip link set dev vif3.0-emu mtu 1500 {SET}")
    assert (host.link("vif3.0-emu"), host.link("vif3.0")) == (UP, UP)
    removed = host.scripts.run(SCRIPT, "remove", "type_if=tap")
    assert (removed.status, removed.calls) == (0, ("ip link set dev vif3.0-emu nomaster down",))
    assert (is_cut_off(host.link("vif3.0-emu")), host.link("vif3.0")) == (True, UP)


@pytest.mark.parametrize("asked", ["add vif", "remove vif", "online tap", "offline tap"])
def test_in_the_turn_of_the_other_kind_nothing_is_done(host: Host, asked: str) -> None:
    action, kind = asked.split()
    ended = host.scripts.run(SCRIPT, action, f"type_if={kind}")
    assert (ended.status, ended.calls, ended.stderr) == (0, (), "")


# --- The mtu ---------------------------------------------------------------------------------------------------------


def test_without_an_mtu_of_its_own_it_gets_the_bridges(host: Host) -> None:
    host.keep(bridge="jumbo0")
    assert host.online().status == 0
    assert (host.link("vif3.0")["mtu"], host.frontend_mtu()) == ("9000", "9000")


def test_its_own_mtu_counts_more(host: Host) -> None:
    host.keep(bridge="jumbo0", mtu="4000")
    assert host.online().status == 0
    assert (host.link("vif3.0")["mtu"], host.frontend_mtu()) == ("4000", "4000")


@pytest.mark.parametrize("mtu", ["70000", "0", "many", "1500 up", "-1"])
def test_an_mtu_that_it_does_not_take_is_told_and_costs_nothing_else(host: Host, mtu: str) -> None:
    host.keep(mtu=mtu)
    ended = host.online()
    assert ended.status == 0
    assert ended.stderr.startswith(f"vif-understudy: vif3.0 does not take an mtu of {mtu}: Error: ")
    assert host.link("vif3.0") == {"master": "xenbr0", "up": "", "address": ADDRESS}
    assert (host.told("hotplug-status"), host.frontend_mtu()) == ("connected", "")


# --- A name of the administrator's -----------------------------------------------------------------------------------


def test_a_vif_is_renamed_within_the_same_command_and_found_by_its_backend(host: Host) -> None:
    host.keep(vifname="web0")
    ended = host.online()
    assert ended.calls[1] == f"ip link set dev vif3.0 mtu 1500 name web0 {SET}"
    assert (ended.status, ended.stderr, host.link("web0")) == (0, "", UP)
    again = host.online()
    assert (again.status, again.stderr, host.link("web0")) == (0, "", UP)
    ended = host.offline()
    assert (ended.status, ended.calls) == (0, ("ip link set dev web0 nomaster down",))
    assert is_cut_off(host.link("web0"))


def test_an_interface_that_has_the_name_already_is_refused_and_never_touched(host: Host) -> None:
    other = host.scripts.run(
        SCRIPT, "online", "type_if=vif", env={"XENBUS_PATH": "backend/vif/4/0", "vif": "vif4.0"}
    )
    assert other.status == 1  # it has no directory in xenstore
    host.keep(vifname="vif4.0")
    (host.state / "links" / "vif4.0" / "up").touch()
    before = host.link("vif4.0")
    ended = host.online()
    assert ended.status == 1
    said = "cannot put vif3.0 on bridge xenbr0 as vif4.0: RTNETLINK answers: File exists"
    assert (host.told("hotplug-status"), host.told("hotplug-error")) == ("error", said)
    assert host.offline().status == 0
    assert host.link("vif4.0") == before
    assert is_cut_off(host.link("vif3.0"))


def test_the_tap_keeps_its_name(host: Host) -> None:
    host.keep(vifname="web0")
    host.online()
    assert host.scripts.run(SCRIPT, "add", "type_if=tap").status == 0
    assert host.link("vif3.0-emu") == UP
    assert host.links() >= {"web0", "vif3.0-emu"}


# --- What fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "at", "says"),
    [
        (Fault.REFUSES, 1, f"cannot read {BACKEND} in xenstore"),
        (Fault.LIES, 1, f"cannot read {BACKEND} in xenstore"),
        (Fault.REFUSES, 3, f"cannot write to {BACKEND} in xenstore"),
        (Fault.LIES, 3, f"cannot write to {BACKEND} in xenstore"),
        (Fault.BREAKS, 2, "cannot put vif3.0 on bridge xenbr0: injected: this one refused"),
        (Fault.BREAKS, 3, f"cannot write to {BACKEND} in xenstore"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_fails_is_told_and_has_no_way_out(host: Host, fault: Fault, at: int, says: str) -> None:
    ended = host.online(fault=fault, at=at)
    assert ended.status == 1
    assert f"vif-understudy: {says}\n" in ended.stderr
    if fault is not Fault.BREAKS:  # then nothing is heard of any more, and what follows could not be done
        assert (host.told("hotplug-status"), host.told("hotplug-error")) == ("error", says)
        assert is_cut_off(host.link("vif3.0"))
    # libxl's next step, when it destroys the domain.
    assert host.offline().status == 0
    assert is_cut_off(host.link("vif3.0"))


@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.LIES], ids=lambda fault: fault.name)
@pytest.mark.parametrize("vifname", ["", "web0"])
def test_one_refusal_of_the_kernels_is_made_good_without_the_mtu(
    host: Host, fault: Fault, vifname: str
) -> None:
    host.keep(vifname=vifname)
    ended = host.online(fault=fault, at=2)
    assert (ended.status, host.told("hotplug-status")) == (0, "connected")
    assert "does not take an mtu of 1500: injected" in ended.stderr
    assert host.link(vifname or "vif3.0").items() >= {"master": "xenbr0", "up": ""}.items()


@pytest.mark.parametrize("fault", [Fault.KILLED, Fault.ENDED], ids=lambda fault: fault.name)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_anywhere_it_is_finished_or_undone_by_the_next(host: Host, fault: Fault, at: int) -> None:
    host.keep(vifname="web0")
    assert host.online(fault=fault, at=at).status in {-9, -15}
    assert host.online().status == 0
    assert (host.link("web0"), host.told("hotplug-status")) == (UP, "connected")
    assert host.offline().status == 0
    assert host.online(fault=fault, at=at).status in {-9, -15}
    assert host.offline().status == 0
    assert is_cut_off(host.link("web0"))


def test_an_interface_that_stays_on_its_bridge_is_no_success(host: Host) -> None:
    host.online()
    ended = host.offline(fault=Fault.REFUSES, at=1)
    assert ended.status == 1
    assert host.told("hotplug-error") == "cannot take vif3.0 off its bridge: injected: this one refused"


# --- What xenstore may say -------------------------------------------------------------------------------------------

HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "x; touch canary",
    'x"; touch canary; "',
    "x'; touch canary; '",
    "${IFS}touch${IFS}canary",
    'xenbr0"',
    'xenbr0" up',
    'xenbr0\nbridge = "jumbo0',
    "xenbr0\\",
    "\\n",
    "*",
    "-R",
    "../xenbr0",
    "up",
    "x" * 300,
]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_bridge_is_a_name_and_nothing_else(host: Host, value: str) -> None:
    host.keep(bridge=value)
    ended = host.online()
    assert ended.status == 1
    assert host.told("hotplug-status") == "error"
    assert host.told("hotplug-error").startswith("cannot put vif3.0 on bridge ")
    assert "is wrong: Device does not exist" in host.told("hotplug-error")
    assert is_cut_off(host.link("vif3.0"))
    assert not list(host.state.parent.rglob("canary"))
    assert not Path("canary").exists()


@pytest.mark.parametrize("value", ['x"; touch canary; "', "$(touch canary)", 'web0\nbridge = "jumbo0'])
@pytest.mark.parametrize("key", ["mtu", "vifname", "frontend", "script"])
def test_no_key_is_executed_or_taken_for_another(host: Host, key: str, value: str) -> None:
    host.keep(**{key: value})
    ended = host.online()
    assert (ended.status == 0) == (key != "vifname"), ended.stderr
    assert host.link("vif3.0").get("master") == (None if key == "vifname" else "xenbr0")
    assert not list(host.state.parent.rglob("canary"))
    assert not Path("canary").exists()


def test_a_key_within_a_directory_of_the_backend_is_not_the_backends(host: Host) -> None:
    nested = host.state / "store" / "local/domain/0" / BACKEND / "aaa"
    nested.mkdir()
    (nested / "bridge").write_text("jumbo0\n")
    assert host.online().status == 0
    assert host.link("vif3.0")["master"] == "xenbr0"


# --- What it cannot do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "env", "keys", "says"),
    [
        (
            ["online", "type_if=vif"],
            {"vif": ""},
            {},
            "libxl has named no interface (variable vif, or INTERFACE",
        ),
        (["add", "type_if=tap"], {"INTERFACE": ""}, {}, "libxl has named no interface"),
        (["online", "type_if=veth"], {}, {}, "there is no kind of interface 'veth' (allowed: vif, tap)"),
        ([], {}, {}, "there is no action '' (allowed: online, offline, add, remove)"),
        (["setup"], {}, {}, "there is no action 'setup'"),
        (["online"], {}, {"bridge": ""}, "cannot bring vif3.0 up: its configuration names no bridge"),
        (["online"], {}, {"bridge": "none0"}, 'argument "none0" is wrong: Device does not exist'),
        (
            ["online"],
            {},
            {"bridge": "vif4.0"},
            "on bridge vif4.0: RTNETLINK answers: Operation not supported",
        ),
        (
            ["online"],
            {"vif": "vif9.0", "XENBUS_PATH": "backend/vif/9/0"},
            {},
            "cannot read backend/vif/9/0 in",
        ),
    ],
)
def test_what_it_cannot_do_it_says(
    host: Host, arguments: list[str], env: dict[str, str], keys: dict[str, str], says: str
) -> None:
    host.keep(**keys)
    ended = host.scripts.run(SCRIPT, *arguments, env=env)
    assert ended.status == 1
    assert says in ended.stderr
    if "XENBUS_PATH" not in env:
        assert host.told("hotplug-status") == "error"
        assert says in host.told("hotplug-error")
    assert is_cut_off(host.link("vif3.0"))


def test_without_libxl_it_says_who_runs_it(host: Host) -> None:
    ended = host.scripts.run(SCRIPT, "online", env={"XENBUS_PATH": ""})
    assert (ended.status, ended.calls) == (1, ())
    assert ended.stderr == "vif-understudy: XENBUS_PATH is not set: this script is run by libxl\n"
