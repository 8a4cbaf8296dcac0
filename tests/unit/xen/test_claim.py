"""One process at a time works on a domain, and nobody but root can be in its way."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from understudy.errors import HypervisorError
from understudy_xen.claim import ClaimTaken, claimed

HOLDER = """
import sys
from pathlib import Path
from understudy_xen.claim import claimed
with claimed(7, directory=Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_in_a_process(tmp_path: Path) -> None:
    taken = "domain 7 is being saved or protected by understudy already"
    with claimed(7, directory=tmp_path):
        with pytest.raises(ClaimTaken, match=taken), claimed(7, directory=tmp_path):
            raise AssertionError
        with claimed(8, directory=tmp_path), claimed(6, directory=tmp_path):
            pass
        with pytest.raises(ClaimTaken, match=taken), claimed(7, directory=tmp_path):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), claimed(7, directory=tmp_path):
        raise ZeroDivisionError
    with claimed(7, directory=tmp_path):
        pass


def test_another_process_has_it_until_it_is_killed(tmp_path: Path) -> None:
    words = (sys.executable, "-c", HOLDER, str(tmp_path))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ClaimTaken), claimed(7, directory=tmp_path):
                raise AssertionError
        finally:
            holder.kill()
    with claimed(7, directory=tmp_path):
        pass


def test_no_name_that_any_user_may_take_is_in_the_way(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("\0understudy-xen-save-7")
        with claimed(7, directory=tmp_path):
            pass
    (made,) = tmp_path.iterdir()
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "understudy-claims").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(HypervisorError, match="domain 7 cannot be claimed in"),
        claimed(7, directory=tmp_path),
    ):
        raise AssertionError
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_the_kernel_refuses_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(HypervisorError, match="domain -5 cannot be claimed in"),
        claimed(-5, directory=tmp_path),
    ):
        raise AssertionError
