"""The how-to shows exactly the files that are tested, and they work as an installed plugin would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.examples import understudy_nvram
from tests.unit.device_fakes import NoPeer
from understudy.device import DeviceInfo, Gate, Kind, Mode, ReplicationMode
from understudy.errors import DeviceNotSupported
from understudy.group import DeviceGroup, GroupSetup
from understudy.plugins import PluginInfo, Plugins
from understudy.services import Services

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "how-to" / "write-a-subkind.md"
EXAMPLES = sorted((HERE / "examples").glob("*.py"))


def test_the_page_shows_the_files_as_they_are() -> None:
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert sorted(shown) == sorted(path.read_text() for path in EXAMPLES)


def test_the_plugin_is_as_short_as_the_page_says() -> None:
    lines = (HERE / "examples" / "understudy_nvram.py").read_text().count("\n")
    assert lines < 60
    assert f"in {lines} lines" in PAGE.read_text()


def setup(directory: Path, side: ReplicationMode, peer: object, size_bytes: int = 9) -> GroupSetup:
    plugins = Plugins()
    plugins.add(understudy_nvram, PluginInfo("nvram", "understudy-nvram", "1", "understudy_nvram"))
    path = directory / side.value
    path.write_bytes(b"old")
    device = DeviceInfo(
        Kind.DISK,
        "disk0",
        0,
        "sim",
        properties={"path": str(path), "bus": "pflash", "size_bytes": size_bytes},
    )
    return GroupSetup(
        guest="web",
        session="s1",
        side=side,
        mode=Mode.REMUS,
        devices=[device],
        subkinds=plugins.subkinds(),
        gates=frozenset({Gate.POSTSUSPEND}),
        services=Services(),
        peer=lambda _: peer,  # type: ignore[arg-type,return-value]
        directory=directory,
        local_address="192.0.2.1",
        peer_address="192.0.2.2",
    )


class Wire(NoPeer):
    """The other half's group, behind JSON."""

    def __init__(self) -> None:
        self.group: DeviceGroup | None = None

    async def request(self, method: str, params: object, *, timeout_s: float) -> dict[str, object]:
        assert self.group is not None
        answer = await self.group.serve("disk0", method, json.loads(json.dumps(params)))
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]


async def test_a_failover_takes_the_checkpoint_that_is_held(tmp_path: Path) -> None:
    wire = Wire()
    secondary = await DeviceGroup.open(setup(tmp_path, ReplicationMode.SECONDARY, NoPeer()))
    wire.group = secondary
    primary = await DeviceGroup.open(setup(tmp_path, ReplicationMode.PRIMARY, wire))
    await secondary.start_all(ReplicationMode.SECONDARY)
    await primary.start_all(ReplicationMode.PRIMARY)
    for epoch, content in enumerate((b"one", b"two", b"three"), start=1):
        (tmp_path / "primary").write_bytes(content)
        await primary.postsuspend(epoch)
        if epoch < 3:  # the primary dies before its third checkpoint is whole
            await secondary.do_checkpoint_all(epoch)
    await secondary.stop_all(failover=True)
    assert (tmp_path / "secondary").read_bytes() == b"two"


async def test_what_it_declines_is_told_to_the_user(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await DeviceGroup.open(setup(tmp_path, ReplicationMode.PRIMARY, NoPeer(), size_bytes=1 << 30))
    [error] = caught.value.exceptions
    assert isinstance(error, DeviceNotSupported)
    assert error.declined == (("nvram", "it is larger than max_size_bytes (1048576)"),)
