"""The xenstored in memory says what a real one said."""

from __future__ import annotations

from pathlib import Path

from tests.unit.xen.xenstore_exchange import Proxy, comparable, converse, differences, load
from tests.unit.xen.xenstored import Xenstored
from understudy_xen.xenstore import XenStore


async def test_the_whole_conversation(tmp_path: Path) -> None:
    place = tmp_path / "proxy"
    with Xenstored(tmp_path / "real"):
        async with Proxy(place, tmp_path / "real") as proxy, await XenStore.open(place) as store:
            await converse(store)
            await store.close()
        assert differences(comparable(proxy.said), comparable(load())) == []
