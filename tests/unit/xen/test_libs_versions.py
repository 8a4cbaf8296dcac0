from __future__ import annotations

from pathlib import Path

import pytest

from understudy_xen.libs import NotXen, UnknownXen, XenVersion
from understudy_xen.libs.versions import FACTS, running_version


def tell(sysfs: Path, *, kind: str = "xen", major: str = "4", minor: str = "17") -> Path:
    (sysfs / "version").mkdir()
    (sysfs / "type").write_text(f"{kind}\n")
    (sysfs / "version/major").write_text(f"{major}\n")
    (sysfs / "version/minor").write_text(f"{minor}\n")
    return sysfs


@pytest.mark.parametrize("version", sorted(FACTS), ids=str)
def test_a_known_version(tmp_path: Path, version: XenVersion) -> None:
    sysfs = tell(tmp_path, major=str(version.major), minor=str(version.minor))
    assert running_version(sysfs) == version


@pytest.mark.parametrize("minor", ["13", "23"])
def test_a_version_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path, minor: str) -> None:
    with pytest.raises(UnknownXen, match=rf"Xen 4\.{minor} runs here.*known are 4\.14 to 4\.22") as caught:
        running_version(tell(tmp_path, minor=minor))
    assert caught.value.problem
    assert caught.value.remedy


def test_a_version_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(UnknownXen, match="no number"):
        running_version(tell(tmp_path, minor="17-rc1"))


def test_no_xen_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotXen, match=r"no Xen runs.*boot the host with Xen"):
        running_version(tmp_path / "none")


def test_another_hypervisor(tmp_path: Path) -> None:
    with pytest.raises(NotXen, match="'kvm', not Xen"):
        running_version(tell(tmp_path, kind="kvm"))


def test_the_facts_grow_with_the_versions() -> None:
    rows = [FACTS[version] for version in sorted(FACTS)]
    assert [row.domctl for row in rows] == sorted(row.domctl for row in rows)
    assert [row.sysctl for row in rows] == sorted(row.sysctl for row in rows)
    assert all(
        row.emulation_at + 4 <= row.info_bytes and row.pages_at + 32 <= row.physinfo_bytes for row in rows
    )
