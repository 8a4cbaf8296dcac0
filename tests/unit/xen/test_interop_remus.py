"""`understudy xen remus` without Xen: to programs that take the stream, do not, or never greet; interrupted at each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.xenstored import Xenstored
from understudy.errors import HypervisorError
from understudy_xen.claim import ClaimTaken, claimed
from understudy_xen.interop import remus as remus_module
from understudy_xen.interop.ending import Outcome
from understudy_xen.interop.remus import BANNER, RemusFigures, run_remus

CONTROL = "/local/domain/8/control/shutdown"
GREETS = f"printf '{BANNER.decode().strip()}\\n'; "


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


@pytest.fixture
async def guest(domains: Domains, store: Xenstored, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Played]:
    """A guest whose kernel suspends as often as it is asked to."""
    monkeypatch.setattr(remus_module, "open_xen", domains.xen)
    store["/local/domain/8/name"] = "web"
    store[CONTROL] = ""
    domains.may_save.set()
    guest = domains[8] = Played()

    async def obey() -> None:
        while True:
            await until(lambda: store[CONTROL] == "suspend")
            store[CONTROL] = ""
            guest.suspend()
            store.tell("@releaseDomain")

    obeying = asyncio.ensure_future(obey())
    yield guest
    obeying.cancel()
    with suppress(asyncio.CancelledError, TimeoutError):
        await obeying


Send = Callable[..., "asyncio.Task[None]"]


@pytest.fixture
def outcome() -> Outcome:
    return Outcome()


@pytest.fixture
def told() -> list[RemusFigures]:
    return []


@pytest.fixture
def send(outcome: Outcome, told: list[RemusFigures]) -> Send:
    def begin(program: str | None, *, count: int = 0) -> asyncio.Task[None]:
        command = None if program is None else ["sh", "-c", program]
        work = run_remus(
            "web", command=command, interval_ms=1, count=count, tell=told.append, outcome=outcome
        )
        return asyncio.create_task(work)

    return begin


async def test_so_many_checkpoints_are_made_and_told(
    guest: Played, send: Send, outcome: Outcome, told: list[RemusFigures]
) -> None:
    await send(None, count=3)
    assert [figures.checkpoint for figures in told] == [1, 2, 3]
    assert outcome == Outcome("web runs on; there is no copy", good=True)
    assert guest.resumed == 4


async def test_interrupted_it_ends_between_two_checkpoints_and_the_copy_is_dropped(
    guest: Played, send: Send, outcome: Outcome, told: list[RemusFigures]
) -> None:
    sending = send(GREETS + "cat > /dev/null; exit 1")
    await until(lambda: len(told) > 1)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert outcome == Outcome("web runs on; the receiver has dropped its copy", good=True)
    assert guest.shutdown is None


async def test_a_receiver_that_does_not_read_any_more_keeps_nobody_suspended(
    guest: Played,
    send: Send,
    outcome: Outcome,
    domains: Domains,
    told: list[RemusFigures],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remus_module, "_LAST_S", 0.2)
    sending = send(GREETS + "head -c 30000 > /dev/null; exec sleep 60")
    await until(lambda: told)
    domains.memory = bytes(1 << 21)  # more than a pipe holds
    await until(lambda: guest.shutdown is not None)
    await asyncio.sleep(0.05)
    sending.cancel()
    with pytest.raises(HypervisorError, match="the receiver has not taken the last checkpoint within"):
        await sending
    assert outcome.said.startswith("web runs on; the receiver may have taken over")
    assert not outcome.good


async def test_interrupted_while_nobody_greets_it_ends_at_once(
    guest: Played, send: Send, outcome: Outcome
) -> None:
    sending = send("exec sleep 60")
    await asyncio.sleep(0.1)
    sending.cancel()
    began_s = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert time.monotonic() - began_s < 5
    assert outcome == Outcome("web runs on; there is no copy", good=True)
    assert guest.resumed == 0


async def test_what_greets_otherwise_is_no_receiver(guest: Played, send: Send, outcome: Outcome) -> None:
    with pytest.raises(HypervisorError, match="'sh' is no receiver of xl"):
        await send("cat /dev/zero")
    assert outcome.said == "web runs on; there is no copy"


async def test_a_guest_that_is_being_protected_is_not_touched(
    guest: Played, send: Send, outcome: Outcome
) -> None:
    with claimed(8), pytest.raises(ClaimTaken):
        await send("exit 3")
    assert outcome == Outcome("nothing was done")
