"""Run one command in the kernel bed: ``python -m tests.testbeds.kernel [--memory MIB] [--keep] [--] COMMAND...``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import termios

from tests.testbeds.kernel.machine import MEMORY_MIB, KernelDied, Machine, missing_for_kernel

DIED = 125  # what env(1) and docker(1) use for "the command was not even run"


def main() -> int:
    """Boot, run, and return the command's exit status; 125 when the kernel died."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbeds.kernel", description=__doc__)
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="of the guest")
    parser.add_argument("--timeout", type=float, metavar="S", help="kill the kernel after so many seconds")
    parser.add_argument("--keep", action="store_true", help="keep the run directory and say where it is")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a shell by default")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if missing := missing_for_kernel():
        parser.error(f"the bed needs {', '.join(missing)}: run 'make setup'")
    keyboard = sys.stdin.isatty()
    # The kernel makes a terminal raw and does not always live to undo it.
    state = termios.tcgetattr(0) if keyboard else None
    machine = Machine(
        command or ["bash"],
        env={
            key: value for key, value in os.environ.items() if key == "TERM" or key.startswith("UNDERSTUDY_")
        },
        memory_mib=given.memory,
        terminal=(0 if keyboard else -1, 1),
    )
    try:
        return machine.wait(given.timeout)
    except KernelDied as problem:
        print(problem, file=sys.stderr)  # noqa: T201 - a command line talks
        return DIED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        machine.close(keep=given.keep)
        if state is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, state)
        if given.keep:
            print(f"kept: {machine.run}", file=sys.stderr)  # noqa: T201


sys.exit(main())
