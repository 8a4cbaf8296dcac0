from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from tests.docs.examples.understudy_nvram import NvramOptions, understudy_subkinds
from understudy import DeviceInfo, Kind, OpenContext, Peer, ReplicationMode
from understudy.testing.subkind_kit import SubkindBed, check_subkind, open_context


class NvramBed(SubkindBed):
    [subkind] = understudy_subkinds()

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for side in ReplicationMode:
            (directory / side.value).mkdir(exist_ok=True)
            (directory / side.value / "vars.fd").write_bytes(b"variables")

    def context(self, side: ReplicationMode, peer: Peer) -> OpenContext:
        path = str(self.directory / side.value / "vars.fd")
        properties = {"path": path, "bus": "pflash", "size_bytes": 9}
        device = DeviceInfo(Kind.DISK, "disk0", 0, "sim", properties=properties)
        return open_context(device, side, peer, options=NvramOptions())

    async def traces(self, side: ReplicationMode) -> Collection[str]:
        return [path.name for path in (self.directory / side.value).iterdir()]


async def test_the_contract(tmp_path: Path) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[SubkindBed]:
        yield NvramBed(tmp_path)

    await check_subkind(make)
