"""A host with domains, without Xen: what its processes would say is said by threads and functions of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.xen.hypervisor import Domains
from tests.unit.xen.xenstored import Xenstored
from understudy_xen import claim
from understudy_xen.xenstore import connection


@pytest.fixture
def domains() -> Domains:
    return Domains()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Xenstored]:
    """A xenstored that is found where the host's is looked for; claims are made beside it."""
    place = tmp_path / "xenstored.socket"
    monkeypatch.setattr(connection, "PLACES", (place,))
    monkeypatch.setattr(claim, "RUN_DIRECTORY", tmp_path / "run")
    with Xenstored(place) as store:
        yield store
