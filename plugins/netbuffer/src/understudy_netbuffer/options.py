"""``[protection.options.netbuffer]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["NetbufferOptions"]

_LEAST_BYTES: Final = 65_536  # one packet of the largest kind
_MOST_BYTES: Final = 0xFFFF_FFFF  # the kernel's number has 32 bits
_LONGEST_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class NetbufferOptions:
    """``[protection.options.netbuffer]``."""

    limit_bytes: int = 10_000_000
    """How much of a guest's output one gate may hold; what comes beyond it is dropped, counted and told."""

    early_share: float = 0.5
    """At which share of the limit a checkpoint is asked for before its time, 0 to 1."""

    full_share: float = 0.9
    """At which share of the limit `when_full` is done, 0 to 1; above `early_share`."""

    when_full: Literal["stall", "unprotect"] = "stall"
    """What is done when a gate is nearly full all the same.

    ``stall`` stops the guest until its output is acknowledged, where the hypervisor lets it run before that.
    ``unprotect`` ends the protection: the guest goes on alone, its output leaves.
    """

    look_ms: int = 10
    """How often the gates' fill is looked at while the guest runs, milliseconds."""

    def __post_init__(self) -> None:
        if not _LEAST_BYTES <= self.limit_bytes <= _MOST_BYTES:
            raise ValueError(f"limit_bytes must be from {_LEAST_BYTES} to {_MOST_BYTES}")
        if not 0 < self.early_share < self.full_share <= 1:
            raise ValueError(
                "early_share and full_share must lie between 0 and 1, early_share below full_share"
            )
        if not 1 <= self.look_ms <= _LONGEST_MS:
            raise ValueError(f"look_ms must be from 1 to {_LONGEST_MS}")
