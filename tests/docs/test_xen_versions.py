"""The table of versions in the docs is the one that is used."""

from __future__ import annotations

from pathlib import Path

from understudy_xen.libs.versions import FACTS

PAGE = Path(__file__).parents[2] / "docs/reference/xen-versions.md"


def test_the_table_is_the_one_that_is_used() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| 4.")]
    expected = [
        f"| {version} | {facts.domctl:#x} | {facts.sysctl:#x} | {facts.info_bytes} bytes | {facts.emulation_at} "
        f"| {facts.physinfo_bytes} bytes | {facts.pages_at} | {facts.resume_in} "
        f"| {'with `memflags` ' if facts.restore_memflags else ''}|"
        for version, facts in sorted(FACTS.items())
    ]
    assert rows == expected
