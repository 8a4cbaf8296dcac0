"""Building the tiny guest: the archive, the cache, and what is said when something is missing."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from understudy_qemu.demo import tinyguest
from understudy_qemu.demo.tinyguest import GuestBuildFailed, TinyGuest, build_guest, cpio_archive


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        body = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = fields[1], data[body : body + fields[6]]
        at = (body + fields[6] + 3) // 4 * 4


def test_the_archive_is_what_the_kernel_reads() -> None:
    entries = [
        ("bin", stat.S_IFDIR | 0o755, b""),
        *((f"bin/f{size}", stat.S_IFREG | 0o644, b"x" * size) for size in range(9)),
    ]
    data = cpio_archive(entries)
    assert len(data) % 4 == 0
    assert read_newc(data) == {name: (mode, content) for name, mode, content in entries}


def test_the_command_line_carries_the_settings() -> None:
    guest = TinyGuest(Path("k"), Path("i"))
    line = guest.cmdline(ips=("10.77.0.2/24", "10.78.0.2/24"), draw=512, extra="more=1")
    words = line.split()
    assert "console=ttyS0" in words
    assert "understudy.ip=10.77.0.2/24,10.78.0.2/24" in words
    assert "understudy.draw=512" in words
    assert "understudy.tcp_timestamps=0" in words
    assert words[-1] == "more=1"
    assert "understudy.tcp_timestamps=1" in guest.cmdline(tcp_timestamps=True).split()


def test_the_cache_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", "/chosen")
    assert tinyguest.default_cache() == Path("/chosen")
    monkeypatch.delenv("UNDERSTUDY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tinyguest.default_cache() == Path("/xdg/understudy")


def test_builders_at_once_make_one_complete_directory(tmp_path: Path) -> None:
    def build(to: Path) -> None:
        (to / "first").write_text("1", encoding="utf-8")
        (to / "second").write_text("2", encoding="utf-8")

    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda _: tinyguest._once(tmp_path, "thing", build), range(32)))
    assert set(places) == {tmp_path / "thing"}
    assert sorted(os.listdir(tmp_path)) == ["thing"]  # noqa: PTH208 - with hidden ones
    assert sorted(p.name for p in places[0].iterdir()) == ["first", "second"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(to: Path) -> None:
        (to / "half").write_text("1", encoding="utf-8")
        raise GuestBuildFailed("on purpose")

    with pytest.raises(GuestBuildFailed, match="on purpose"):
        tinyguest._once(tmp_path, "thing", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("present", "sentence"),
    [([], "gcc is missing"), (["gcc"], "apt-get is missing"), (["gcc", "apt-get"], "dpkg is missing")],
)
async def test_what_is_missing_is_named(
    present: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in present:
        program(tmp_path / "bin" / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GuestBuildFailed, match=sentence):
        await build_guest(tmp_path / "cache")


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # In front of the real ones, with the words that the real ones say.
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    depends, show = "Depends: linux-image-9-cloud", "Version: 9.1+x~1"
    program(tmp_path / "bin/apt-cache", f'[ "$1" = show ] && echo "{show}" || echo "  {depends}"')
    program(tmp_path / "bin/apt-get", 'case "$*" in *download*) : > k.deb ;; esac')
    return tmp_path / "bin"


def fake_dpkg(directory: Path, modules: str) -> None:
    lib = '"$3/lib/modules/9/kernel"'
    program(
        directory / "dpkg",
        f'mkdir -p "$3/boot" {lib}; echo kernel > "$3/boot/vmlinuz-9"; cd {lib}; '
        f"for m in {modules}; do echo $m > $m.ko; done; echo kernel/virtio_mmio.ko > ../modules.builtin",
    )


def test_the_kernel_package_is_unpacked_to_what_is_needed(fake_apt: Path, tmp_path: Path) -> None:
    fake_dpkg(fake_apt, " ".join(m for m in tinyguest.MODULES if m != "virtio_mmio"))
    assert tinyguest._kernel_package() == ("linux-image-9-cloud", "9.1+x~1")
    (tmp_path / "to").mkdir()
    tinyguest._unpack_kernel("linux-image-9-cloud", tmp_path / "to")
    assert (tmp_path / "to/vmlinuz").read_text(encoding="utf-8") == "kernel\n"
    names = {path.stem for path in (tmp_path / "to/modules").iterdir()}
    assert names == set(tinyguest.MODULES) - {"virtio_mmio"}
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["modules", "vmlinuz"]


def test_a_kernel_without_a_module_is_refused(fake_apt: Path, tmp_path: Path) -> None:
    fake_dpkg(fake_apt, "virtio")
    (tmp_path / "to").mkdir()
    with pytest.raises(GuestBuildFailed, match="no module virtio_ring"):
        tinyguest._unpack_kernel("linux-image-9-cloud", tmp_path / "to")


def test_the_last_line_of_a_failed_program_is_told(fake_apt: Path, tmp_path: Path) -> None:
    program(fake_apt / "apt-get", "echo first >&2; echo E: no such host >&2; exit 100")
    with pytest.raises(GuestBuildFailed, match="apt-get -q -o failed: E: no such host"):
        tinyguest._unpack_kernel("linux-image-9-cloud", tmp_path)


def test_a_program_that_hangs_is_given_up(fake_apt: Path) -> None:
    program(fake_apt / "apt-cache", "exec sleep 1000")
    with pytest.raises(GuestBuildFailed, match="apt-cache did not end within 0 s"):
        tinyguest._run("apt-cache", timeout_s=0.2)


def test_old_package_lists_are_renewed(
    fake_apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_dpkg(fake_apt, " ".join(tinyguest.MODULES))
    program(
        fake_apt / "apt-get",
        f'case "$*" in *update*) : > {tmp_path}/new ;; *) [ -e {tmp_path}/new ] && : > k.deb ;; esac',
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(GuestBuildFailed, match="apt-get -q -o failed"):
        tinyguest._kernel(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (tinyguest._kernel(tmp_path) / "vmlinuz").exists()


@pytest.fixture
def asked(fake_apt: Path, tmp_path: Path) -> Path:
    """What apt was asked, a word a line; the guest can be built."""
    fake_dpkg(fake_apt, " ".join(tinyguest.MODULES))
    program(fake_apt / "gcc", ': > "$4"')
    words = tmp_path / "asked"
    script = (fake_apt / "apt-cache").read_text()
    (fake_apt / "apt-cache").write_text(script.replace("\n", f'\necho "$1" >>{words}\n', 1))
    return words


def test_a_process_asks_apt_once(asked: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = tinyguest._build_guest(cache)
    assert tinyguest._build_guest(cache) == made
    assert asked.read_text().split() == ["depends", "show"]
    made.initrd.parent.rename(tmp_path / "away")
    assert tinyguest._build_guest(cache).initrd.exists()
    assert asked.read_text().split() == ["depends", "show"] * 2


def test_one_process_at_a_time_asks_apt(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with (cache / ".lock").open("w") as other, monkeypatch.context() as patched:
        fcntl.flock(other, fcntl.LOCK_EX)
        patched.setattr(tinyguest, "_OTHERS_S", 0.0)
        with pytest.raises(GuestBuildFailed, match="another process has been building"):
            tinyguest._build_guest(cache)
        assert not asked.exists()
    assert tinyguest._build_guest(cache).kernel.exists()


def test_an_unknown_kernel_package_is_said(fake_apt: Path) -> None:
    program(fake_apt / "apt-cache", "exit 0")
    with pytest.raises(GuestBuildFailed, match="apt knows no package linux-image-cloud-amd64"):
        tinyguest._kernel_package()


def test_init_is_a_shell_script_without_errors() -> None:
    init, _ = tinyguest._own_files()
    subprocess.run(["sh", "-n", str(init)], check=True)
