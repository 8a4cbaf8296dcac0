"""Whether a kernel has what a gate is made of, told without making anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["missing_parts"]

_NEEDED: Final = {
    "sch_plug": "the plug qdisc",
    "ifb": "IFB interfaces",
    "act_mirred": "redirection",
    "sch_ingress": "the ingress qdisc",
}
_EITHER: Final = ("cls_matchall", "cls_u32")


def missing_parts(modules: Path | None = None, loaded: Path = Path("/sys/module")) -> list[str]:
    """Return what the running kernel lacks, in words; empty if everything is loaded, built in or can be loaded.

    Args:
        modules: Where the kernel's modules are listed (``modules.dep``, ``modules.builtin``); the running kernel's.
        loaded: Where those that are loaded are listed.
    """
    directory = modules or Path("/lib/modules") / os.uname().release
    names = set()
    for listing in ("modules.dep", "modules.builtin"):
        path = directory / listing
        lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
        names |= {Path(line.partition(":")[0]).name.partition(".")[0].replace("-", "_") for line in lines}
    names |= {path.name for path in loaded.iterdir()} if loaded.is_dir() else set()
    missing = [f"{what} (module {name})" for name, what in _NEEDED.items() if name not in names]
    if not names & set(_EITHER):
        missing.append(f"a filter that matches everything (module {' or '.join(_EITHER)})")
    return missing
