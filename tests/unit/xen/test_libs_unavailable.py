"""What an operator is told on a machine where Xen cannot be used; here that is this very machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from understudy_xen.libs import LibraryMissing, NotXen, XenUnavailable, XenVersion, open_xen
from understudy_xen.libs.loading import Library, find_libraries
from understudy_xen.restorer.client import Restorer

pytestmark = pytest.mark.skipif(
    Path("/sys/hypervisor/type").exists(), reason="a hypervisor tells of itself here"
)


def test_no_xen() -> None:
    with pytest.raises(NotXen, match="boot the host with Xen"):
        open_xen()


async def test_no_xen_for_the_restorer_either() -> None:
    reading, writing = os.pipe()
    with pytest.raises(XenUnavailable, match="boot the host with Xen"):
        await Restorer.start(stream_fd=reading)
    # Nobody reads the stream any more: whoever writes it is told.
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)


def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(
        LibraryMissing, match=r"libxenctrl\.so\.4\.14 cannot be loaded.*apt install libxenmisc4\.14"
    ):
        find_libraries(XenVersion(4, 14))


def test_a_library_without_a_function() -> None:
    with pytest.raises(LibraryMissing, match=r"libc\.so\.6 has no function xc_domain_save"):
        Library("libc.so.6", {"xc_domain_save": (None, ())}, "install another one")
