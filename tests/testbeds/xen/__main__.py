"""Run one command in a fresh dom0: ``python -m tests.testbeds.xen [--hosts 2] [--keep] [--] COMMAND...``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import termios

from tests.testbeds.xen.checkout import packed
from tests.testbeds.xen.image import NotBuilt, image, missing_for_xen
from tests.testbeds.xen.machine import DOM0_MIB, MEMORY_MIB, Plug, XenDied, XenMachine
from tests.testbeds.xen.network import Network

DIED = 125  # what env(1) and docker(1) use for "the command was not even run"
NAMES = ("alpha", "beta")


def main() -> int:
    """Boot, run, and return the command's exit status; 125 when the host died."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbeds.xen", description=__doc__)
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="the command runs in the first")
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="of each host")
    parser.add_argument("--dom0", type=int, default=DOM0_MIB, metavar="MIB", help="of it for each dom0")
    parser.add_argument("--timeout", type=float, metavar="S", help="kill the hosts after so many seconds")
    parser.add_argument("--keep", action="store_true", help="keep the run directory and say where it is")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a shell by default")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if missing := missing_for_xen():
        parser.error(f"the bed needs {', '.join(missing)}: run 'make setup'")
    state = termios.tcgetattr(0) if sys.stdin.isatty() else None
    try:
        return _run(given, command or ["bash", "-i"])
    except (NotBuilt, XenDied) as problem:
        print(problem, file=sys.stderr)  # noqa: T201 - a command line talks
        return DIED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if state is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, state)


def _run(given: argparse.Namespace, command: list[str]) -> int:
    built = image()
    machines: list[XenMachine] = []
    with Network(given.hosts) as network:
        names = NAMES[: given.hosts]
        plugs = [Plug(network, number) for number in range(1, given.hosts + 1)]
        try:
            for name, plug in zip(names, plugs, strict=True):
                machines.append(
                    XenMachine(
                        built,
                        packed(),
                        ["sleep", "infinity"] if machines else command,
                        env={
                            key: value for key, value in os.environ.items() if key.startswith("UNDERSTUDY_")
                        },
                        memory_mib=given.memory,
                        dom0_mib=given.dom0,
                        hostname=name,
                        plug=plug,
                        hosts={name: plug.address for name, plug in zip(names, plugs, strict=True)},
                        terminal=None if machines else (0 if sys.stdin.isatty() else -1, 1),
                    )
                )
            return machines[0].wait(given.timeout)
        finally:
            for machine in machines:
                machine.close(keep=given.keep)
                if given.keep:
                    print(f"kept: {machine.run}", file=sys.stderr)  # noqa: T201


sys.exit(main())
