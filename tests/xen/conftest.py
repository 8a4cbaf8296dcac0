"""Hosts of the Xen bed for tests that run outside."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.testbeds.bed import need
from tests.testbeds.xen.host import XenHost
from tests.testbeds.xen.image import missing_for_xen
from tests.testbeds.xen.machine import Plug
from tests.testbeds.xen.network import Network
from tests.testbeds.xen.pair import XenPair


@pytest.fixture
async def xen_host() -> AsyncIterator[XenHost]:
    """One fresh host, alone on its network."""
    need("xen", missing_for_xen())
    with Network(1) as network:
        async with await XenHost.boot(plug=Plug(network, 1)) as host:
            yield host


@pytest.fixture
async def xen_pair() -> AsyncIterator[XenPair]:
    """Two fresh hosts and a client."""
    need("xen", missing_for_xen())
    async with XenPair() as pair:
        yield pair
