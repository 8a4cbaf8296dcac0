"""What a gate consists of in the kernel: made, looked at and removed, by pyroute2, in a thread.

::

    guest → interface ─ingress: matchall→ redirect→ IFB ─root: plug→ (the interface's ingress again) → bridge

The IFB is made on demand, for one interface, with a name that is derived from it. The kernel makes a name only once:
whoever made the IFB has the claim, and its alias says for whom (guest, device, interface, session). So a claim outlives
an agent, is gone after a reboot like the gate itself, and no list of ours can disagree with the kernel.

Calls may wait for the kernel's lock of the network configuration; none of these functions is called in the event loop.
pyroute2 is imported when the first gate is made: an agent that needs none does not wait for it.

Source: tools/hotplug/Linux/remus-netbuf-setup of Xen, whose filter (``proto ip``) lets IPv6 and ARP pass; Linux
drivers/net/ifb.c, net/sched/{sch_plug,sch_ingress,act_mirred}.c.
"""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from understudy.device import Verdict
from understudy.errors import HypervisorError
from understudy_netbuffer.rtnetlink import INGRESS, INGRESS_HANDLE, ROOT

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = ["Claim", "Installed", "claims", "gate_name", "install", "remove", "repair", "right"]

FIRST_HANDLE: Final = 0x10000  #: 1:, of the first plug of a gate; every fresh one has the next
_LAST_HANDLE: Final = 0x7FFF0000
_PRIORITY: Final = 1  # of the filter: nothing can come before it
_EVERYTHING: Final = 3  # ETH_P_ALL, which pyroute2 takes in the host's byte order
_PROBE_TYPE: Final = 0x88B5  # an EtherType for local experiments (IEEE 802)
_QUEUE_PACKETS: Final = 10_000  # of the IFB behind the plug: a released epoch must not stop half-way
_MODPROBE_S: Final = 10.0
_DRAIN_S: Final = 2.0
_POLL_S: Final = 0.001
_ALIAS_BYTES: Final = 255


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose gate an IFB is; kept as its alias."""

    guest: str
    nic: str
    interface: str
    session: str

    def alias(self) -> str:
        """Return it as the kernel keeps it."""
        return json.dumps({"understudy-gate": asdict(self)}, separators=(",", ":"))

    @classmethod
    def of(cls, alias: str | None) -> Claim | None:
        """Return the claim that an alias states, if it states one."""
        with suppress(ValueError, TypeError, KeyError):
            return cls(**json.loads(alias or "")["understudy-gate"])
        return None


@dataclass(frozen=True, slots=True)
class Installed:
    """A gate as it stands in the kernel."""

    claim: Claim
    ifb: str
    ifb_index: int
    index: int  #: of the guest's interface
    handle: int  #: of the plug at the IFB's root


def gate_name(interface: str) -> str:
    """Return the name of the IFB that gates an interface: 15 characters, the longest that there is."""
    return f"usg{hashlib.sha256(interface.encode()).hexdigest()[:12]}"


def install(claim: Claim, limit_bytes: int) -> Installed:
    """Make a gate that lets everything pass, with the guest running behind it.

    The gate is tried before the guest's traffic is led into it: a packet of ours must be held, and leave.

    Args:
        claim: For whom.
        limit_bytes: How much it may hold.

    Raises:
        HypervisorError: There is a gate or another ingress qdisc already, the kernel lacks a part, or the trial failed.

    Guarantees:
        After a failure nothing of it is left.
    """
    if len(claim.alias()) > _ALIAS_BYTES:
        raise HypervisorError(
            f"the names of {claim.guest}, {claim.nic} and {claim.interface} are too long for an alias"
        )
    with _kernel(f"gate {claim.interface}") as ip:
        index = _index(ip, claim.interface)
        if index is None:
            raise HypervisorError(f"there is no interface {claim.interface}")
        ifb = gate_name(claim.interface)
        _refuse_taken(ip, ifb, claim)
        if _ingress_kinds(ip.get_qdiscs(), index):
            raise HypervisorError(
                f"{claim.interface} has an ingress or clsact qdisc already; "
                "what it does with the guest's output could go past the gate: remove it"
            )
        _make_ifb(ip, ifb)
        try:
            found = _index(ip, ifb)
            if found is None:
                raise HypervisorError(f"{ifb} is gone as soon as it was made")
            gate = Installed(claim, ifb, found, index, FIRST_HANDLE)
            ip.link("set", index=found, ifalias=claim.alias())
            ip.tc(
                "add",
                "plug",
                found,
                handle=FIRST_HANDLE,
                parent=ROOT,
                action="TCQ_PLUG_LIMIT",
                limit=limit_bytes,
            )
            ip.link("set", index=found, state="up")
            _try_out(ip, gate)
            _redirect(ip, gate)
            if problem := _wrong(ip, gate):
                raise HypervisorError(
                    f"read back, the gate of {claim.interface} is not what was made: {problem}"
                )
        except BaseException:
            with suppress(Exception):
                _take_away(ip, ifb, index)
            raise
        return gate


def right(gate: Installed) -> str:
    """Look whether a gate stands as it was made.

    Returns:
        What is wrong with it, ``""`` for nothing.
    """
    with _kernel(f"look at the gate of {gate.claim.interface}") as ip:
        return _wrong(ip, gate)


def repair(gate: Installed, limit_bytes: int, *, closed: bool) -> Installed:
    """Make a gate anew around a guest that runs: closed and empty, with fresh counters, before anything else.

    Args:
        gate: As it stood.
        limit_bytes: How much it may hold.
        closed: Whether it holds; else everything passes.

    Returns:
        The gate as it stands now.

    Raises:
        HypervisorError: It cannot be; the guest's output passes if its interface is still there.

    Guarantees:
        What was held in the old one never leaves.
    """
    claim = gate.claim
    with _kernel(f"gate {claim.interface} again") as ip:
        index = _index(ip, claim.interface)
        if index != gate.index:
            raise HypervisorError(f"the interface {claim.interface} is gone")
        ifb_index = _index(ip, gate.ifb)
        if ifb_index is None:
            _make_ifb(ip, gate.ifb)
            ifb_index = _index(ip, gate.ifb)
            assert ifb_index is not None  # noqa: S101 - it was made in this moment
            ip.link("set", index=ifb_index, ifalias=claim.alias())
        if _kind(ip.get_links(ifb_index)[0]) != "ifb":
            raise HypervisorError(f"{gate.ifb} is no IFB any more")
        # A qdisc of a new handle takes the place of whatever is there in one step: no packet finds an open way.
        qdiscs = list(ip.get_qdiscs())
        handle = _next(gate.handle)
        if handle == _plug_handle(qdiscs, ifb_index):
            handle = _next(handle)
        ip.tc("replace", "plug", ifb_index, handle=handle, parent=ROOT, **_limit(limit_bytes))
        fresh = Installed(claim, gate.ifb, ifb_index, index, handle)
        if not closed:
            _tell(ip, fresh, "TCQ_PLUG_RELEASE_INDEFINITE")
        ip.link("set", index=ifb_index, state="up")
        if _redirection_wrong(ip, fresh, qdiscs):
            if _ingress_kinds(qdiscs, index):
                ip.tc("del", "ingress", index, INGRESS_HANDLE)
            _redirect(ip, fresh)
        if problem := _wrong(ip, fresh):
            raise HypervisorError(f"the gate of {claim.interface} is wrong again: {problem}")
        return fresh


def remove(claim: Claim, verdict: Verdict) -> list[str]:
    """Remove a gate, whatever is left of it; what it holds leaves first (KEEP), or never (DISCARD).

    Returns:
        What was removed, in words; empty if there was nothing.

    Raises:
        HypervisorError: The kernel refuses.

    Guarantees:
        With DISCARD the guest's interface, if it is still there, is down before its gate is gone.
    """
    with _kernel(f"remove the gate of {claim.interface}") as ip:
        index, ifb = _index(ip, claim.interface), gate_name(claim.interface)
        ifb_index = _index(ip, ifb)
        if ifb_index is not None and _claim_of(ip, ifb_index) not in {None, claim}:
            return []  # of another session
        if verdict is Verdict.DISCARD and index is not None and ifb_index is not None:
            ip.link("set", index=index, state="down")
        if (
            verdict is Verdict.KEEP
            and ifb_index is not None
            and (handle := _plug_handle(ip.get_qdiscs(), ifb_index))
        ):
            gate = Installed(claim, ifb, ifb_index, index or 0, handle)
            ip.link("set", index=ifb_index, state="up")
            _tell(ip, gate, "TCQ_PLUG_RELEASE_INDEFINITE")
            _until(lambda: not _held(ip, ifb_index))
        return _take_away(ip, ifb, index)


def claims() -> list[Claim]:
    """Return the claims of all gates that stand on this host."""
    with _kernel("list gates") as ip:
        stated = (Claim.of(link.get_attr("IFLA_IFALIAS")) for link in ip.get_links())
        return [claim for claim in stated if claim is not None]


# --- Parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def _kernel(what: str) -> Iterator[IPRoute]:
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415 - see above

    try:
        with IPRoute(ext_ack=True) as ip:
            yield ip
    except NetlinkError as error:
        said = error.args[1] if len(error.args) > 1 else error
        raise HypervisorError(f"cannot {what}: the kernel says: {said} (errno {error.code})") from error
    except OSError as error:
        raise HypervisorError(f"cannot {what}: {error.strerror or error}") from error


def _index(ip: IPRoute, name: str) -> int | None:
    found = ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


def _kind(link: Any) -> str | None:
    info = link.get_attr("IFLA_LINKINFO")
    return info.get_attr("IFLA_INFO_KIND") if info is not None else None


def _claim_of(ip: IPRoute, index: int) -> Claim | None:
    return Claim.of(ip.get_links(index)[0].get_attr("IFLA_IFALIAS"))


def _refuse_taken(ip: IPRoute, ifb: str, claim: Claim) -> None:
    if (other := _index(ip, ifb)) is not None:
        whose = _claim_of(ip, other)
        by = (
            f"guest {whose.guest}, session {whose.session}" if whose else "somebody who has not said his name"
        )
        raise HypervisorError(
            f"{claim.interface} is gated already ({ifb}, by {by}); the agent removes a gate that was left "
            "when the record says alone"
        )


def _make_ifb(ip: IPRoute, ifb: str) -> None:
    if not Path("/sys/module/ifb").exists():
        # Loaded by the next line it would come with two interfaces that nobody asked for, unless systemd's
        # configuration is there. Without modprobe, or with the driver built in, the next line is the one that knows.
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["modprobe", "-q", "ifb", "numifbs=0"], check=False, timeout=_MODPROBE_S)
    # The kernel makes a name once: of several who try at the same moment, one succeeds.
    ip.link("add", ifname=ifb, kind="ifb", txqlen=_QUEUE_PACKETS)
    with suppress(OSError):  # a kernel without IPv6; one with it would send from the IFB on the host's behalf
        Path(f"/proc/sys/net/ipv6/conf/{ifb}/disable_ipv6").write_text("1", encoding="ascii")


def _redirect(ip: IPRoute, gate: Installed) -> None:
    ip.tc("add", "ingress", gate.index, INGRESS_HANDLE)
    mirred = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": gate.ifb_index}
    where = {"parent": INGRESS_HANDLE, "protocol": _EVERYTHING, "prio": _PRIORITY, "action": mirred}
    from pyroute2 import NetlinkError  # noqa: PLC0415 - see above

    try:
        ip.tc("add-filter", "matchall", gate.index, **where)
    except NetlinkError:
        # A kernel without it: u32 with a mask of zero matches everything, too.
        ip.tc("add-filter", "u32", gate.index, keys=["0x0/0x0+0"], target=FIRST_HANDLE, **where)


def _try_out(ip: IPRoute, gate: Installed) -> None:
    # Neither the limit nor the state of a plug can be read. So a frame of ours is put in: a plug without a limit would
    # drop it, an open one would let it pass. Released, it ends in the IFB, which takes only what was redirected to it.
    frame = bytes(12) + struct.pack("!H", _PROBE_TYPE) + bytes(46)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((gate.ifb, 0))
        sender.send(frame)
    stats = _stats(ip, gate.ifb_index)
    if not stats or not stats["qlen"] or stats["drops"]:
        raise HypervisorError(f"{gate.ifb} does not hold what is sent into it: {stats}")
    _tell(ip, gate, "TCQ_PLUG_RELEASE_INDEFINITE")
    if not _until(lambda: not _held(ip, gate.ifb_index)):
        raise HypervisorError(f"{gate.ifb} does not let out what is released")


def _next(handle: int) -> int:
    return handle + FIRST_HANDLE if handle < _LAST_HANDLE else FIRST_HANDLE


def _limit(limit_bytes: int) -> dict[str, Any]:
    # Never without: pyroute2 would send a limit of 0, and tc none, which means 32 packets of the IFB's MTU.
    return {"action": "TCQ_PLUG_LIMIT", "limit": limit_bytes}


def _tell(ip: IPRoute, gate: Installed, action: str) -> None:
    ip.tc("change", "plug", gate.ifb_index, handle=gate.handle, parent=ROOT, action=action)


def _wrong(ip: IPRoute, gate: Installed) -> str:
    ifb, interface = _link(ip, gate.ifb_index), _link(ip, gate.index)
    if ifb is None or (ifb.get_attr("IFLA_IFNAME"), _kind(ifb)) != (gate.ifb, "ifb"):
        return f"{gate.ifb} is gone"
    if not ifb["flags"] & 1:
        return f"{gate.ifb} is down"
    if interface is None or interface.get_attr("IFLA_IFNAME") != gate.claim.interface:
        return f"{gate.claim.interface} is gone"
    qdiscs = ip.get_qdiscs()
    if _plug_handle(qdiscs, gate.ifb_index) != gate.handle:
        return f"at the root of {gate.ifb} is not the plug that was put there"
    return _redirection_wrong(ip, gate, qdiscs)


def _redirection_wrong(ip: IPRoute, gate: Installed, qdiscs: Iterable[Any]) -> str:
    name = gate.claim.interface
    if _ingress_kinds(qdiscs, gate.index) != ["ingress"]:
        return f"{name} has no ingress qdisc of ours"
    targets = []
    for entry in ip.get_filters(index=gate.index, parent=INGRESS_HANDLE):
        priority, protocol = entry["info"] >> 16, socket.ntohs(entry["info"] & 0xFFFF)
        if (priority, protocol) != (_PRIORITY, _EVERYTHING):
            return f"{name} has a filter that is not ours"
        targets += _redirections(entry)
    if targets != [gate.ifb_index]:
        return f"the filter of {name} does not lead everything to {gate.ifb}"
    return ""


def _redirections(entry: Any) -> list[int]:
    # The interfaces that a filter redirects to; every other action is none.
    options = entry.get_attr("TCA_OPTIONS")
    actions = None
    if options is not None and entry.get_attr("TCA_KIND") in {"matchall", "u32"}:
        actions = options.get_attr("TCA_MATCHALL_ACT") or options.get_attr("TCA_U32_ACT")
    if actions is None:
        return []
    found = []
    for _, action in actions["attrs"]:
        inner = action.get_attr("TCA_ACT_OPTIONS")
        kind = action.get_attr("TCA_ACT_KIND")
        mirred = inner.get_attr("TCA_MIRRED_PARMS") if kind == "mirred" else None
        # TC_ACT_STOLEN with TCA_EGRESS_REDIR: it goes there and nowhere else.
        if mirred is not None and (mirred["action"], mirred["eaction"]) == (4, 1):
            found.append(int(mirred["ifindex"]))
        else:
            found.append(0)
    return found


def _link(ip: IPRoute, index: int) -> Any:
    from pyroute2 import NetlinkError  # noqa: PLC0415 - see above

    try:
        return ip.get_links(index)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _ingress_kinds(qdiscs: Iterable[Any], index: int) -> list[str]:
    return [q.get_attr("TCA_KIND") for q in qdiscs if q["index"] == index and q["parent"] == INGRESS]


def _plug_handle(qdiscs: Iterable[Any], index: int) -> int:
    for qdisc in qdiscs:
        if (qdisc["index"], qdisc["parent"], qdisc.get_attr("TCA_KIND")) == (index, ROOT, "plug"):
            return int(qdisc["handle"])
    return 0


def _stats(ip: IPRoute, index: int) -> Mapping[str, int] | None:
    # The kernel tells of all qdiscs or none: a question for one of them would look like a change to who listens.
    for qdisc in ip.get_qdiscs():
        if (qdisc["index"], qdisc["parent"]) == (index, ROOT):
            queue: Mapping[str, int] = qdisc.get_attr("TCA_STATS2").get_attr("TCA_STATS_QUEUE")
            return queue
    return None


def _held(ip: IPRoute, index: int) -> int:
    stats = _stats(ip, index)
    return stats["qlen"] if stats else 0


def _take_away(ip: IPRoute, ifb: str, index: int | None) -> list[str]:
    done = []
    ifb_index = _index(ip, ifb)
    if index is not None and _leads_to(ip, index, ifb_index):
        ip.tc("del", "ingress", index, INGRESS_HANDLE)
        done.append(f"the redirection of everything into {ifb}")
    if ifb_index is not None:
        # What left the plug is on its way through the IFB's own queue.
        _until(lambda: _passed_on(ip, ifb_index), 0.2)
        ip.link("del", index=ifb_index)
        done.append(ifb)
    return done


def _leads_to(ip: IPRoute, index: int, ifb_index: int | None) -> bool:
    if _ingress_kinds(ip.get_qdiscs(), index) != ["ingress"]:
        return False
    filters = ip.get_filters(index=index, parent=INGRESS_HANDLE)
    targets = [target for entry in filters for target in _redirections(entry)]
    # Without any filter it was left by a removal or a setup that was cut short; one that leads nowhere swallows
    # everything since somebody deleted the IFB.
    there = {link["index"] for link in ip.get_links()}
    return ifb_index in targets or not there & set(targets)


def _passed_on(ip: IPRoute, ifb_index: int) -> bool:
    counted = ip.get_links(ifb_index)[0].get_attr("IFLA_STATS64")
    return bool(
        counted["tx_packets"] + counted["tx_dropped"] + counted["rx_dropped"] >= counted["rx_packets"]
    )


def _until(condition: Callable[[], bool], limit_s: float = _DRAIN_S) -> bool:
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True
