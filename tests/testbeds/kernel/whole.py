"""Files by which a kernel that may die at any moment and those outside tell each other something."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file that nobody ever sees half-written, whenever the kernel dies."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text)
    draft.replace(path)
