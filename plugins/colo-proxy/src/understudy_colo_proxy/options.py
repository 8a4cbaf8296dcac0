"""``[protection.options.colo-proxy]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ColoProxyOptions"]

_LONGEST_MS = 3_600_000
_MOST_PACKETS = 1_000_000


@dataclass(frozen=True, slots=True)
class ColoProxyOptions:
    """``[protection.options.colo-proxy]``."""

    compare_timeout_ms: int = 500
    """How old a packet that only one copy has sent may become before a checkpoint is asked for, milliseconds.

    QEMU alone takes 3000. A client waits that long at worst for an answer that the copy never gives.
    """

    expired_scan_cycle_ms: int = 100
    """How often QEMU looks for such packets, milliseconds; QEMU alone takes 1000."""

    max_queue_size_packets: int = 1024
    """How many packets of one connection QEMU keeps for each copy; more are dropped.

    QEMU has one such number for all NICs of a guest: give them the same.
    """

    checkpoint_delay_ms: int = 10_000
    """The longest time between two checkpoints, milliseconds; the hypervisor's own is used if that is shorter."""

    uncompared_ipv6: Literal["drop", "allow"] = "drop"
    """What becomes of packets that cannot be compared: everything but IPv4 and ARP.

    ``allow`` is unsafe: the guest says in IPv6 what its copy never said.
    """

    def __post_init__(self) -> None:
        for name in ("compare_timeout_ms", "expired_scan_cycle_ms", "checkpoint_delay_ms"):
            if not 1 <= getattr(self, name) <= _LONGEST_MS:
                raise ValueError(f"{name} must be from 1 to {_LONGEST_MS}")
        if not 1 <= self.max_queue_size_packets <= _MOST_PACKETS:
            raise ValueError(f"max_queue_size_packets must be from 1 to {_MOST_PACKETS}")
