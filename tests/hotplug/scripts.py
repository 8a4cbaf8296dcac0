"""Run a hotplug script with every command that it calls recorded, and one of them failing where the test says.

On the script's PATH stands, for each command, a wrapper that writes down the call and then runs the real thing: the
fakes of tests/hotplug/fakehost, or, in the kernel bed, the host's own programs.
"""

from __future__ import annotations

import enum
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

HOTPLUG: Final = Path(__file__).parents[2] / "hotplug"
FAKES: Final = Path(__file__).parent / "fakehost"
COMMANDS: Final = (
    *("ip", "tc", "modprobe", "mkdir", "flock", "awk", "stat", "drbdsetup"),
    *("xenstore-ls", "xenstore-write", "xenstore-rm", "xenstore-exists"),
)
DEADLINE_S: Final = 30.0  #: a script takes a fraction of a second; in the kernel bed one or two
NEVER: Final = 1_000_000
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class Fault(enum.Enum):
    """What befalls a command."""

    REFUSES = "does nothing and fails"
    LIES = "does its work and fails all the same"
    BREAKS = "fails, and so does everything after it"
    KILLED = "the script is killed when it has done its work"
    ENDED = "the script gets SIGTERM when it has done its work"


# It calls no command of its own (in the kernel bed each costs as much as the one that is called), and takes itself
# off the PATH of what it calls: a fake's own commands are not the script's.
_WRAPPER: Final = """\
#!/bin/sh
PATH={path}
[ -n "$FAULT_AT" ] || exec {command} "$@"
fault() {
    echo "injected: this one $1" >&2
    exit 1
}
call="{name} $*"
printf '%s\\n' "${call%%
*}" >>{calls}
read -r count <{count}
count=$((count + 1))
echo "$count" >{count}
[ "$count" -ge "$FAULT_AT" ] || exec {command} "$@"
case $((count - FAULT_AT)):$FAULT in
    0:REFUSES|*:BREAKS) fault refused ;;
    0:LIES) {command} "$@"; fault lied ;;
    0:KILLED) {command} "$@"; kill -KILL 0 ;;
    0:ENDED) {command} "$@"; status=$?; kill -TERM 0; exit $status ;;
    *) exec {command} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    status: int  #: exit status, or minus the signal
    results: Mapping[str, str]  #: lines ``key=value`` of its standard output
    stderr: str
    calls: tuple[str, ...]  #: each command with its arguments


class Scripts:
    """The hotplug scripts, run over a host that is faked or real.

    Args:
        directory: an empty directory of the test's.
        fakes: directory of programs that stand for those of the host; the others are the host's own.
        env: what every script gets in its environment.
    """

    def __init__(self, directory: Path, fakes: Path | None, env: Mapping[str, str]) -> None:
        self._directory = directory
        self._wrappers = directory / "wrappers"
        self._wrappers.mkdir()
        path = f"{fakes}:{os.environ['PATH']}" if fakes else os.environ["PATH"]
        for name in COMMANDS:
            command = shutil.which(name, path=path)
            if command is not None:
                self._wrap(name, {"path": os.environ["PATH"], "command": command, "name": name})
        self.env = {
            "PATH": f"{self._wrappers}:{os.environ['PATH']}",
            "UNDERSTUDY_HOTPLUG_DIR": str(directory / "lock"),
            **env,
        }

    def start(self, script: str, *arguments: str, env: Mapping[str, str] = _NOTHING) -> subprocess.Popen[str]:
        """Start a script and do not wait for it; several at a time are not recorded."""
        return self._start(script, arguments, {**env, "FAULT_AT": ""})

    def run(
        self,
        script: str,
        *arguments: str,
        fault: Fault = Fault.REFUSES,
        at: int = NEVER,
        env: Mapping[str, str] = _NOTHING,
    ) -> Ended:
        """Run a script to its end.

        Args:
            script: its name.
            arguments: of the script.
            fault: what befalls one of its commands.
            at: which one, counted from 1 in the order of the calls.
            env: added to its environment.
        """
        (self._directory / "count").write_text("0\n", encoding="utf-8")
        calls = self._directory / "calls"
        calls.write_text("", encoding="utf-8")
        faulty = {**env, "FAULT": fault.name, "FAULT_AT": str(at)}
        with self._start(script, arguments, faulty) as process:
            try:
                stdout, stderr = process.communicate(timeout=DEADLINE_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        results = dict(line.split("=", 1) for line in stdout.splitlines())
        return Ended(
            process.returncode, results, stderr, tuple(calls.read_text(encoding="utf-8").splitlines())
        )

    def _start(self, script: str, arguments: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[str]:
        # A group of its own: a fault kills it as the agent would, with all its children.
        return subprocess.Popen(
            [HOTPLUG / script, *arguments],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def _wrap(self, name: str, values: dict[str, str]) -> None:
        text = _WRAPPER
        for key in ("count", "calls"):
            values[key] = str(self._directory / key)
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", shlex.quote(value))
        wrapper = self._wrappers / name
        wrapper.write_text(text, encoding="utf-8")
        wrapper.chmod(0o755)
