"""Guests for the hosts of the Xen bed: configurations for xl, for what lies in dom0's /guest.

``linux`` is the kernel with an initial ramdisk of its own: a TCP counter (tests/testbeds/xen/guest/counter.c) on port 7
and a shell on port 8, with a network card and a disk that are as real as Xen makes them. It runs as PVH or HVM guest.
``tiny`` is a PVH guest of 4 MB without any driver, quick to start and to copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["COUNTER_PORT", "GUEST", "SHELL_PORT", "Nic", "linux", "tiny"]

GUEST: Final = "10.9.0.50"  #: address of a guest by default
COUNTER_PORT: Final = 7
SHELL_PORT: Final = 8
SCRIPT: Final = "vif-understudy"
LIFE_CYCLE: Final = ("on_poweroff", "on_reboot", "on_crash", "on_soft_reset", "on_watchdog")


@dataclass(frozen=True)
class Nic:
    """A network card of a guest.

    Args:
        mac: its address.
        bridge: of dom0.
        script: its hotplug script.
        more: other settings of xl, such as ``model=e1000``.
    """

    mac: str = "00:16:3e:00:00:32"
    bridge: str = "xenbr0"
    script: str = SCRIPT
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = (f"mac={self.mac}", f"bridge={self.bridge}", f"script={self.script}", *self.more)
        return ",".join(words)


def linux(
    name: str = "web",
    *,
    kind: str = "pvh",
    memory_mib: int = 96,
    nics: tuple[Nic, ...] = (Nic(),),
    disks: tuple[str, ...] = (),
    address: str = GUEST,
    dirty_kib: int = 64,
    arguments: str = "",
    preserve: bool = False,
    **more: Any,
) -> str:
    """Return the configuration of a Linux guest.

    Args:
        name: of the guest.
        kind: ``pvh`` or ``hvm``.
        memory_mib: of the guest; 96 is enough for pvh, 128 for hvm.
        nics: its network cards.
        disks: its disks, in the words of xl-disk-configuration(5); the first should be ``xvda``.
        address: of its first card.
        dirty_kib: memory that it writes every 200 ms.
        arguments: more arguments of its kernel, such as ``xen_nopv``.
        preserve: keep the domain, dead, after its shutdown, reboot or crash.
        more: other settings of xl.cfg(5).
    """
    console = "hvc0" if kind == "pvh" else "ttyS0"
    settings: dict[str, Any] = {
        # QEMU's own loader of an HVM guest knows no ELF with a ramdisk.
        "kernel": "/guest/vmlinux" if kind == "pvh" else "/guest/vmlinuz",
        "ramdisk": "/guest/initrd",
        "cmdline": f"console={console} quiet loglevel=3 address={address} dirty={dirty_kib} {arguments}".strip(),
        "vif": [str(nic) for nic in nics],
    }
    if disks:
        settings["disk"] = list(disks)
    if kind == "hvm":
        settings |= {"serial": f"file:/var/log/xen/guest-{name}.log", "vga": "none", "sdl": 0, "vnc": 0}
        settings |= {"usb": 0, "acpi": 1}
    return _config(name, kind, memory_mib, preserve=preserve, **{**settings, **more})


def tiny(name: str = "tiny", *, preserve: bool = False, **more: Any) -> str:
    """Return the configuration of the tiny guest.

    Args:
        name: of the guest.
        preserve: as for `linux`.
        more: other settings of xl.cfg(5).
    """
    return _config(name, "pvh", 4, preserve=preserve, kernel="/guest/tiny", **more)


def _config(name: str, kind: str, memory_mib: int, *, preserve: bool, **settings: Any) -> str:
    settings = {
        "name": name,
        "type": kind,
        "memory": memory_mib,
        "vcpus": 1,
        # QEMU's nested SVM reports RDTSCP as RDTSC, and Xen then stumbles over the instruction's length.
        "tsc_mode": "native",
        **dict.fromkeys(LIFE_CYCLE if preserve else (), "preserve"),
        **settings,
    }
    # Strings, numbers and lists of both are the same in JSON and in xl.cfg(5).
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
