"""The pair of DRBD nodes that the tests of a module share: made once, whole again before each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.drbdpair import DrbdPair, drbd_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrbdPair]:
    """The pair, as the test before left it."""
    with drbd_pair(tmp_path_factory.mktemp("drbd")) as pair:
        yield pair


@pytest.fixture
async def pair(made: DrbdPair) -> DrbdPair:
    """The pair: connected, up to date, nothing on it."""
    await made.begin()
    return made
