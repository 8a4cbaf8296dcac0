"""One host of the Xen bed: a QEMU outside, Xen and a Debian dom0 inside, one command in dom0."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.testbeds.machine import INSIDE, BedMachine, MachineDied
from tests.testbeds.xen.checkout import ROOT, Checkout
from tests.testbeds.xen.image import XEN_VERSION, Image
from tests.testbeds.xen.network import Network
from tests.testbeds.xen.post import PORT
from tests.testbeds.xen.turns import take_turn

__all__ = ["DOM0_MIB", "MEMORY_MIB", "Plug", "XenDied", "XenMachine"]

MEMORY_MIB: Final = 1400
DOM0_MIB: Final = 800
# Found by trial, see the module's source note: SMAP and XSAVE of -cpu max end in faults of dom0 and of guests.
CPU: Final = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+svm,+npt,-rdtscp"
# A crash of Xen or dom0 ends in a reboot, which ends QEMU.
XEN_ARGUMENTS: Final = "console=com1 com1=115200 loglvl=all guest_loglvl=all"
LINUX_ARGUMENTS: Final = "console=hvc0 rdinit=/init quiet loglevel=4"
TERMINAL: Final = "/dev/hvc1"  # the first virtio console; hvc0 is Xen's
ENVIRONMENT: Final = {
    "PATH": ":".join(
        (
            f"{ROOT}/.venv/bin",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            f"/usr/lib/xen-{XEN_VERSION}/bin",
        )
    ),
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "xterm",
    INSIDE: "xen",
    # The checkout is read-only, and compiled.
    "PYTHONDONTWRITEBYTECODE": "1",
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",  # noqa: S108 - dom0's own, in memory
}


class XenDied(MachineDied):
    """The host ended before its command did; the message ends with the tail of its console."""


@dataclass(frozen=True)
class Plug:
    """A host's place in a network.

    Args:
        network: the network.
        number: of the host, from 1: its address is ``10.9.0.<number>``, its MAC address ends with it.
    """

    network: Network
    number: int

    @property
    def address(self) -> str:
        """The address of dom0's bridge ``xenbr0``."""
        return f"10.9.0.{self.number}"


class XenMachine(BedMachine):
    """A booted host that runs one command in dom0 and powers off.

    Args:
        image: what it boots from.
        checkout: what dom0 runs Python from.
        command: what to run in dom0, found there on PATH.
        cwd: where in dom0.
        env: environment of the command besides the bed's own.
        memory_mib: of the host.
        dom0_mib: of dom0; the rest, less about 100 MiB, is for guests.
        hostname: of dom0.
        shared: directories that dom0 sees at the same path, by 9p without any cache.
        disks: image files outside that are dom0's ``/dev/vdc``, ``/dev/vdd`` and so on. What dom0 has written is in
            them, however the host ends.
        plug: its place in a network; none by default.
        hosts: names and addresses for /etc/hosts.
        terminal: file descriptors that the command reads and writes as a terminal, -1 for nothing to read; by default
            its output goes to the console.

    Guarantees:
        After `close` no process and no file of it is left. It dies with the thread that made it.

    Source:
        docs/misc/xen-command-line.pandoc; QEMU 7.2: hw/i386/multiboot.c, docs/system/invocation (fsdev, chardev).
    """

    name = "the Xen host of the bed"
    death = XenDied

    def __init__(
        self,
        image: Image,
        checkout: Checkout,
        command: Sequence[str],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        memory_mib: int = MEMORY_MIB,
        dom0_mib: int = DOM0_MIB,
        hostname: str = "bed",
        shared: Iterable[Path] = (),
        disks: Iterable[Path] = (),
        plug: Plug | None = None,
        hosts: Mapping[str, str] | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> None:
        take_turn()
        super().__init__("understudy-xen-")
        try:
            shares = list(shared)
            self._write_command(command, cwd, env or {}, terminal)
            self._write_settings(hostname, plug, shares, hosts or {})
            arguments = self._boot_arguments(image, memory_mib, dom0_mib)
            arguments += self._disk_arguments(image, checkout, disks)
            arguments += self._share_arguments(shares)
            arguments += self._line_arguments()
            self._process = self._start(arguments, [self._far.fileno(), checkout.fd], plug, terminal)
        except BaseException:
            self._forget()
            raise
        finally:
            self._far.close()

    def _write_command(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], terminal: tuple[int, int] | None
    ) -> None:
        environment = {**ENVIRONMENT, "BED_RUN": str(self.run), **env}
        words = ["exec", "env", "-i", *(f"{key}={value}" for key, value in environment.items()), *command]
        script = f"cd {shlex.quote(str(cwd))}\n{shlex.join(words)}\n"
        if terminal is not None:
            # A session of its own makes it the controlling terminal: job control and Ctrl-C work.
            mode = "raw"
            if os.isatty(terminal[1]):
                size = os.get_terminal_size(terminal[1])
                mode = f"sane rows {size.lines} cols {size.columns}"
            (self.run / "in-terminal").write_text(f"stty {mode}\n{script}")
            script = f'exec setsid -c /bin/sh "$BED_RUN/in-terminal" <>{TERMINAL} >&0 2>&1\n'
        (self.run / "command").write_text(script)

    def _write_settings(
        self,
        hostname: str,
        plug: Plug | None,
        shared: Sequence[Path],
        hosts: Mapping[str, str],
    ) -> None:
        settings = {
            "hostname": hostname,
            "address": plug.address if plug else "10.9.0.1",
            "xen": XEN_VERSION,
        }
        lines = [f"{key}={shlex.quote(value)}" for key, value in settings.items()]
        lines.append(f"set -- {shlex.join(str(path) for path in shared)}")
        (self.run / "settings").write_text("\n".join(lines) + "\n")
        names = "".join(f"{address} {name}\n" for name, address in hosts.items())
        (self.run / "hosts").write_text(names)

    def _boot_arguments(self, image: Image, memory_mib: int, dom0_mib: int) -> list[str]:
        dom0 = f"dom0_mem={dom0_mib}M,max:{dom0_mib}M dom0_max_vcpus=1"
        linux = f"{LINUX_ARGUMENTS} BED_ROOT={ROOT} BED_RUN={self.run}"
        return [
            *("-accel", "tcg,tb-size=512"),
            # One processor: with two, nested guests have triple-faulted with Xen's own registers in their state.
            *("-machine", "q35", "-cpu", CPU, "-smp", "1", "-m", str(memory_mib)),
            *("-display", "none", "-nodefaults", "-no-reboot", "-no-user-config"),
            *("-kernel", str(image.hypervisor), "-append", f"{dom0} {XEN_ARGUMENTS}"),
            *("-initrd", f"{image.kernel} {linux},{image.initrd}"),
        ]

    def _disk_arguments(self, image: Image, checkout: Checkout, disks: Iterable[Path]) -> list[str]:
        # What dom0 writes goes to an unlinked file and is gone with QEMU.
        root = f"file={image.root},if=none,id=root,format=raw,snapshot=on"
        tree = f"file={checkout.path},if=none,id=checkout,format=raw,readonly=on"
        drives = {"root": root, "checkout": tree}
        for number, path in enumerate(disks):
            # Nothing is held back in QEMU: what the machine below has in its cache outlives QEMU, and only that dies.
            drive = f"file={path},if=none,id=disk{number},format=raw,cache=unsafe"
            drives[f"disk{number}"] = drive
        arguments = []
        for name, drive in drives.items():
            arguments += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},disable-legacy=on"]
        return arguments

    def _share_arguments(self, shared: Sequence[Path]) -> list[str]:
        arguments = []
        tags = {"run": self.run, **{f"share{number}": path for number, path in enumerate(shared)}}
        for tag, path in tags.items():
            # QEMU is root here: files get dom0's owners and modes as they are. With `remap` it ends a listing early
            # when a name goes away under it, and the C library says nothing of it: a file server that the arbiter must
            # bear.
            arguments += ["-fsdev", f"local,id={tag},path={path},security_model=passthrough,multidevs=remap"]
            arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        return arguments

    def _line_arguments(self) -> list[str]:
        return [
            *("-chardev", f"file,id=console,path={self._console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=line,fd={self._far.fileno()}"),
            *("-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=line,name={PORT}"),
        ]

    def _start(
        self, arguments: list[str], passed: list[int], plug: Plug | None, terminal: tuple[int, int] | None
    ) -> subprocess.Popen[bytes]:
        # Killed with its maker: nobody would end it who does not know of it.
        words = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *arguments]
        if plug is not None:
            mac = f"52:54:00:09:00:{plug.number:02x}"
            tap = f"tap,id=net,ifname={plug.network.tap(plug.number)},script=no,downscript=no"
            words += ["-netdev", tap, "-device", f"virtio-net-pci,netdev=net,mac={mac},romfile="]
            words = plug.network.switch.command(words)
            passed = [*passed, plug.network.switch.fileno()]
        self._console.touch()
        if terminal is not None:
            words += ["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal"]
        with (self.run / "qemu").open("wb") as said:
            readable, writable = terminal or (-1, said.fileno())
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL if readable < 0 else readable,
                stdout=writable,
                stderr=said,
                env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": str(self.run)},
                pass_fds=passed,
                # A session of its own: Ctrl-C at the tests' terminal is for the tests alone.
                start_new_session=True,
            )

    def console(self) -> str:
        """Return what Xen, dom0 and QEMU itself said."""
        return (self.run / "qemu").read_text(errors="replace") + super().console()
