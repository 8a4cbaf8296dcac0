"""Make a machine out of namespaces, and run programs in it.

Run as a file with the standard library alone, never imported into anything large, because entering
a mount namespace needs a process with a single thread::

    namespaces.py init  NAME OWNER [NS_FD ...] [-- MOUNT ...]   become the parent of a first process
    namespaces.py enter OWNER NS_FD [NS_FD ...] -- PROGRAM ...  run a program inside

``init`` makes a new PID namespace whose first process reaps orphans and does nothing else. With no
file descriptors it makes new network, mount and host-name namespaces too; with some it uses those,
which is how a machine whose processes were all killed comes back with its network as it was left.
It prints the process id of the first process, as seen from outside, once the machine is usable.
Killing that process kills all of the machine at once.

A MOUNT is ``tmpfs:PLACE``, ``bind:SOURCE:PLACE`` or ``hide:PLACE`` (empty), made in that order.

Each process here dies when its parent does, so nothing outlives an owner that was killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x2, 0x4, 0x8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(source: str, place: str, kind: str | None, flags: int) -> None:
    kind_bytes = kind.encode() if kind else None
    try:
        _call("mount", source.encode(), place.encode(), kind_bytes, ctypes.c_ulong(flags), None)
    except OSError as error:
        raise OSError(error.errno, f"cannot mount {source} on {place}: {error.strerror}") from error


def _die_with_parent(parent: int) -> None:
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have gone before the call, and then no signal would ever come. In a new PID
    # namespace the parent is outside and reads as 0.
    if os.getppid() not in {parent, 0}:
        os._exit(1)


def _mount_all(mounts: Sequence[str]) -> None:
    for mount in mounts:
        verb, *places = mount.split(":")
        if verb == "bind":
            source, place = places
            Path(place).mkdir(parents=True, exist_ok=True)
            _mount(source, place, None, MS_BIND | MS_REC)
        elif verb in {"tmpfs", "hide"}:
            _mount("tmpfs", places[0], "tmpfs", MS_NOSUID | MS_NODEV)
        else:
            raise ValueError(f"unknown mount {mount!r}")


def _reap_for_ever() -> None:
    # A first process has no default actions, so only SIGKILL from outside ends it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def init(name: str, owner: int, namespace_fds: Sequence[int], mounts: Sequence[str]) -> int:
    """Make the machine, print its first process' id, stay as that process' parent.

    Args:
        name: host name inside.
        owner: process id of the caller; nothing is made if it is gone.
        namespace_fds: namespaces to use again; none makes new ones.
        mounts: what to mount in new ones.
    """
    _die_with_parent(owner)
    for fd in namespace_fds:
        _call("setns", fd, 0)
    fresh = 0 if namespace_fds else CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWNET
    _call("unshare", CLONE_NEWPID | fresh)
    ready, said = os.pipe()
    launcher = os.getpid()
    first = os.fork()
    if first == 0:
        _die_with_parent(launcher)
        os.setsid()
        if fresh:
            os.close(ready)
            _mount("none", "/", None, MS_REC | MS_PRIVATE)
            _call("sethostname", name.encode(), len(name))
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if fresh:
            # /sys/class/net shows the network namespace that sysfs was mounted in.
            _mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
            _mount_all(mounts)
        os.write(said, b"!")
        os.close(said)
        _reap_for_ever()
    os.close(said)
    if os.read(ready, 1):
        sys.stdout.write(f"{first}\n")
        sys.stdout.flush()
    os.waitpid(first, 0)
    return 0


def enter(owner: int, namespace_fds: Sequence[int], argv: Sequence[str]) -> int:
    """Run a program inside, pass signals on to it, and end as it ends.

    Returns:
        Its exit code; a program that died of a signal makes this process die of the same.
    """
    _die_with_parent(owner)
    for fd in namespace_fds:
        _call("setns", fd, 0)
    launcher = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        _die_with_parent(launcher)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        try:
            os.execvp(argv[0], list(argv))  # noqa: S606 - a list, and no shell
        except OSError as error:
            sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
            os._exit(127)
    for number in _FORWARDED:
        signal.signal(number, lambda which, _: os.kill(child, which))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in {signal.SIGKILL, signal.SIGSTOP} else None
        os.kill(os.getpid(), -code)
    return code


def main(argv: Sequence[str]) -> int:
    """Do what the arguments say; an error is one line on standard error and exit code 125."""
    at = argv.index("--") if "--" in argv else len(argv)
    options, rest = argv[:at], argv[at + 1 :]
    try:
        if options[0] == "init":
            return init(options[1], int(options[2]), [int(fd) for fd in options[3:]], rest)
        return enter(int(options[1]), [int(fd) for fd in options[2:]], rest)
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
