"""A host with domains, without Xen: what its processes would say is said by threads and functions of the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.xen.hypervisor import Domains
from tests.unit.xen.xenstored import Xenstored
from understudy.device import Mode
from understudy.hypervisor import HostContext, Protection
from understudy_xen import claim
from understudy_xen.guestfile import XenConfig, parse_config
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.xenstore import connection

#: ``xl destroy DOMID``, which takes long for domain 9 and fails for 10, and ``xl list -l DOMID``; there is no more.
XL = """#!/bin/sh
case "$1 $2" in
"destroy 9") sleep 0.3; touch {graves}/9 ;;
"destroy 10") echo "libxl: no way"; exit 1 ;;
"destroy "*) touch {graves}/"$2" ;;
"list -l") printf '[{{"domid": %s, "config": {{"c_info": {{"name": "web"}}}}}}]' "$3" ;;
*) exit 2 ;;
esac
"""


@pytest.fixture
def domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Domains:
    """No domains yet; ``xl destroy`` ends them."""
    graves, programs = tmp_path / "graves", tmp_path / "programs"
    for directory in (graves, programs):
        directory.mkdir()
    (programs / "xl").write_text(XL.format(graves=graves))
    (programs / "xl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Domains(graves)


@pytest.fixture
def hypervisor(tmp_path: Path, domains: Domains, store: Xenstored) -> XenHypervisor:
    """The plugin on the host ``alpha`` with these domains."""
    hypervisor = XenHypervisor(HostContext("alpha", "127.0.0.1", tmp_path, tmp_path, tmp_path))
    hypervisor._xen = domains.xen()
    return hypervisor


@pytest.fixture
def config() -> XenConfig:
    """The guest ``web``."""
    return parse_config(
        {"config": "web.cfg"},
        name="web",
        source=Path("/x/web.toml"),
        protection=Protection(Mode.REMUS),
        host="alpha",
    )


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for Xen's directory of what runs; it is not made yet."""
    monkeypatch.setattr(claim, "RUN_DIRECTORY", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def store(tmp_path: Path, run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Xenstored]:
    """A xenstored that is found where the host's is looked for."""
    place = tmp_path / "xenstored.socket"
    monkeypatch.setattr(connection, "PLACES", (place,))
    with Xenstored(place) as store:
        yield store


@pytest.fixture
def restorer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have restorers be processes without libxl that behave in a way; see played_restorer.py."""

    def choose(behaviour: str) -> None:
        program = tmp_path / "python"
        played = Path(__file__).with_name("played_restorer.py")
        # As it is called: -m understudy_xen.restorer CONTROL_FD [STREAM_FD]
        program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S {played} {behaviour} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return choose
