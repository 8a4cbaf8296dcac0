"""What `understudy xen` says when it is interrupted or fails: what was done, and in what state all is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.unit.xen.hypervisor import Domains, Played
from tests.unit.xen.link import stream
from tests.unit.xen.xenstored import Xenstored
from understudy.errors import HypervisorError, StateError
from understudy_xen import copies
from understudy_xen.claim import ClaimTaken, claimed
from understudy_xen.hypervisor import XenHypervisor
from understudy_xen.interop import receive as receive_module
from understudy_xen.interop import saving as saving_module
from understudy_xen.interop.command import _run
from understudy_xen.interop.ending import Outcome, whole
from understudy_xen.interop.receive import promote, receive
from understudy_xen.interop.saving import save_to
from understudy_xen.libs import LibxlFailed
from understudy_xen.savers import restored_by
from understudy_xen.streams.writer import preamble

CONTROL = "/local/domain/{}/control/shutdown"
KNOWN = uuid.UUID(int=5)
LIMIT_BYTES = 1 << 20


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "fails", "status", "said"),
    [
        (False, False, 1, "understudy: interrupted; web runs on\n"),
        (True, False, 0, "understudy: interrupted; web runs on\n"),
        (False, True, 1, "understudy: no room; web runs on\n"),
        (True, True, 1, "understudy: no room; web runs on\n"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_tells_what_is_the_case(
    capsys: pytest.CaptureFixture[str], number: int, good: bool, fails: bool, status: int, said: str
) -> None:
    outcome = Outcome()

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(10)
        finally:
            outcome.said, outcome.good = "web runs on", good
            if fails:
                raise HypervisorError("no room")

    with pytest.raises(SystemExit) as ended:
        _run(work(), outcome)
    assert (ended.value.code, capsys.readouterr().err) == (status, said)


async def test_what_failed_although_it_was_interrupted_is_told() -> None:
    async def work() -> None:
        await asyncio.sleep(0.05)
        raise HypervisorError("the guest does not run")

    task = asyncio.ensure_future(whole(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(HypervisorError, match="the guest does not run"):
        await task


# --- receive ---------------------------------------------------------------------------------------------------------


@dataclass
class Receiving:
    """A receiver that runs, and the sender's end of its standard input."""

    task: asyncio.Task[tuple[str, int, int]]
    outcome: Outcome
    sender: int
    copied: list[str]


@pytest.fixture
def receiving(
    domains: Domains, store: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Awaitable[Receiving]]:
    """Begin to receive a stream of so many checkpoints after the first copy, not ended yet."""
    monkeypatch.setattr(receive_module, "open_xen", domains.xen)
    config = json.loads(Path(__file__).with_name("tiny-pvh.json").read_text())
    config["c_info"] |= {"name": "web", "uuid": str(KNOWN)}

    async def begin(checkpoints: int) -> Receiving:
        source, sender = os.pipe2(os.O_CLOEXEC)
        outcome = Outcome()
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        copied: list[str] = []
        task = asyncio.create_task(
            receive(source, null, outcome, hold_limit_bytes=LIMIT_BYTES, silence_s=0, copied=copied.append)
        )
        task.add_done_callback(lambda _: os.close(null))
        os.write(sender, preamble(json.dumps(config).encode()) + b"".join(stream(checkpoints).parts))
        return Receiving(task, outcome, sender, copied)

    return begin


Begin = Callable[[int], Awaitable[Receiving]]


async def test_a_copy_is_held_when_the_sender_ends(
    receiving: Begin, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("reads")
    await copies.note("web", KNOWN)  # an agent's, long ago
    held = await receiving(2)
    await until(lambda: held.copied)
    os.close(held.sender)
    assert await held.task == ("web--incoming", 8, 2)
    assert held.outcome.good
    assert (
        "web--incoming (domain 8) holds the first copy and 2 checkpoints; it is paused" in held.outcome.said
    )
    assert await copies.noted("web") == set()  # so no janitor takes it for that one


async def test_where_there_is_a_copy_already_nothing_is_said_to_be_gone(
    receiving: Begin, copy: Played, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("reads")
    held = await receiving(1)
    with pytest.raises(HypervisorError, match="there is a domain web--incoming already"):
        await held.task
    assert held.outcome == Outcome("nothing was done")
    os.close(held.sender)


async def test_libxls_own_words_are_told_when_it_fails_before_the_end(
    receiving: Begin, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("fails")
    held = await receiving(2)
    with pytest.raises(LibxlFailed, match="no such bridge"):
        await held.task
    assert (held.outcome.said, held.outcome.good) == ("nothing is left of the copy", False)
    os.close(held.sender)


@pytest.mark.parametrize("has_name", [True, False])
async def test_an_interrupted_receiver_leaves_nothing(
    receiving: Begin, restorer_is: Callable[[str], None], domains: Domains, store: Xenstored, has_name: bool
) -> None:
    restorer_is("reads")
    held = await receiving(1)
    await until(lambda: held.copied)
    domains[8] = Played(uuid=KNOWN)
    if has_name:
        store["/local/domain/8/name"] = "web--incoming"
    store["/local/domain/7/name"] = "web"
    domains[7] = Played(uuid=KNOWN)  # the guest itself, as when a host sends to itself
    held.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held.task
    assert (held.outcome.said, held.outcome.good) == ("nothing is left of the copy", False)
    assert [info.domid for info in domains.xen().domains()] == [7]
    os.close(held.sender)


async def test_a_copy_that_cannot_be_removed_is_told(
    receiving: Begin, restorer_is: Callable[[str], None], domains: Domains, store: Xenstored
) -> None:
    restorer_is("reads")
    held = await receiving(1)
    await until(lambda: held.copied)
    domains[10] = Played()
    store["/local/domain/10/name"] = "web--incoming"
    held.task.cancel()
    with pytest.raises(HypervisorError, match="libxl: no way"):
        await held.task
    assert "a part of web--incoming may be left" in held.outcome.said
    os.close(held.sender)


async def test_a_copy_that_is_whole_stays_although_the_receiver_is_interrupted(
    receiving: Begin, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("lingers")
    held = await receiving(1)
    await until(lambda: held.copied)
    os.close(held.sender)
    await until(lambda: held.outcome.good)
    held.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held.task
    assert held.outcome.good
    assert "holds the first copy and 1 checkpoints; it is paused" in held.outcome.said


async def test_the_only_copy_is_made_although_the_receiver_is_interrupted_when_the_sender_has_ended(
    receiving: Begin, restorer_is: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    restorer_is("makes-slowly")
    caplog.set_level("INFO", receive_module.__name__)
    held = await receiving(1)
    await until(lambda: held.copied)
    os.close(held.sender)
    await until(lambda: "the primary" in caplog.text)  # it is known that the stream has ended
    assert held.outcome.said == "nothing was done"
    held.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held.task
    assert held.outcome.good
    assert "web--incoming (domain 8) holds the first copy and 1 checkpoints" in held.outcome.said


# --- promote ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(domains: Domains, store: Xenstored, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(receive_module, "open_xen", domains.xen)
    store["/local/domain/8/name"] = "web--incoming"
    domains[8] = Played(pauses=1)
    return domains[8]


async def test_a_promotion_that_has_begun_is_not_interrupted(
    copy: Played, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("lingers")
    outcome = Outcome()
    task = asyncio.ensure_future(promote("web", outcome, reason="a test"))
    await until(lambda: "paused" in outcome.said)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcome == Outcome("web runs (domain 8)", good=True)


async def test_a_copy_of_an_agents_is_not_promoted_without_its_record(copy: Played) -> None:
    await copies.note("web", copy.uuid)
    with pytest.raises(StateError, match="an agent of this host has made web--incoming"):
        await promote("web", Outcome(), reason="a test")
    assert copy.pauses == 1


async def test_a_copy_that_is_still_being_received_is_not_promoted(
    copy: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "proc" / "4711"
    helper.mkdir(parents=True)
    (helper / "cmdline").write_bytes(
        b"/usr/lib/xen-4.17/bin/libxl-save-helper\0--restore-domain\x008\x009\x008\0"
    )
    monkeypatch.setattr(receive_module, "restored_by", partial(restored_by, proc=helper.parent))
    with pytest.raises(StateError, match=r"is still being received \(libxl-save-helper, pid 4711\)"):
        await promote("web", Outcome(), reason="a test")
    assert copy.pauses == 1


async def test_a_promotion_that_fails_half_way_tells_how_far_it_came(
    copy: Played, restorer_is: Callable[[str], None]
) -> None:
    restorer_is("stuck")
    outcome = Outcome()
    with pytest.raises(LibxlFailed):
        await promote("web", outcome, reason="a test")
    assert outcome == Outcome("domain 8 is called web, and may be paused yet: xl unpause web")


# --- save ------------------------------------------------------------------------------------------------------------


@dataclass
class Saving:
    """A guest that is being saved."""

    guest: Played
    task: asyncio.Task[int]
    outcome: Outcome
    file: Path

    def files(self) -> dict[str, bytes]:
        return {place.name: place.read_bytes() for place in self.file.parent.iterdir()}


@pytest.fixture
def saving(
    tmp_path: Path, domains: Domains, store: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Awaitable[Saving]]:
    """Begin to save the guest ``web`` of a number over a file of before; its kernel does what it is asked."""
    monkeypatch.setattr(saving_module, "open_xen", domains.xen)

    @asynccontextmanager
    async def kernel(domid: int) -> AsyncIterator[None]:
        async def obey() -> None:
            await until(lambda: store[CONTROL.format(domid)] == "suspend")
            store[CONTROL.format(domid)] = ""
            domains[domid].suspend()
            store.tell("@releaseDomain")

        obeying = asyncio.ensure_future(obey())
        try:
            yield
        finally:
            obeying.cancel()
            with suppress(asyncio.CancelledError):
                await obeying

    async def begin(domid: int, *, keep: bool = False) -> Saving:
        store[f"/local/domain/{domid}/name"] = "web"
        store[CONTROL.format(domid)] = ""
        domains[domid] = Played()
        (tmp_path / "files").mkdir()
        file = tmp_path / "files" / "web.save"
        file.write_bytes(b"before")
        outcome = Outcome()

        async def work() -> int:
            async with kernel(domid):
                return await save_to("web", file, outcome, keep=keep)

        return Saving(domains[domid], asyncio.create_task(work()), outcome, file)

    return begin


BeginSave = Callable[..., Awaitable[Saving]]


@pytest.mark.parametrize("keep", [True, False])
async def test_a_guest_is_saved(saving: BeginSave, domains: Domains, keep: bool) -> None:
    domains.may_save.set()
    save = await saving(8, keep=keep)
    size = await save.task
    doing = "runs on" if keep else "is gone"
    assert save.outcome == Outcome(f"web is saved in {save.file}, {size} bytes; the guest {doing}", good=True)
    assert list(save.files()) == ["web.save"]
    assert b"memory" in save.files()["web.save"]
    assert save.guest.resumed == int(keep)


async def test_interrupted_before_the_file_is_there_the_guest_runs_on(
    saving: BeginSave, domains: Domains
) -> None:
    save = await saving(8)
    await until(lambda: len(save.files()) == 2)
    save.task.cancel()
    await asyncio.sleep(0.05)
    assert "may be suspended" in save.outcome.said
    domains.may_save.set()
    with pytest.raises(asyncio.CancelledError):
        await save.task
    assert save.outcome == Outcome(f"web runs on, and {save.file} is as it was")
    assert save.files() == {"web.save": b"before"}


async def test_interrupted_when_the_file_is_there_the_save_is_brought_to_its_end(
    saving: BeginSave, domains: Domains
) -> None:
    domains.may_save.set()
    save = await saving(9)  # which takes long to be destroyed
    await until(lambda: save.files().get("web.save") != b"before")
    save.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await save.task
    assert save.outcome.good
    assert save.outcome.said.endswith("bytes; the guest is gone")


@pytest.mark.parametrize("keep", [True, False])
async def test_nobody_else_lets_the_guest_go_before_the_save_has_ended(
    saving: BeginSave,
    domains: Domains,
    hypervisor: XenHypervisor,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
) -> None:
    put = saving_module._put
    may_go_on = threading.Event()

    def waits(draft: Path, file: Path) -> int:
        may_go_on.wait(10)
        return put(draft, file)

    monkeypatch.setattr(saving_module, "_put", waits)
    domains.may_save.set()
    save = await saving(8, keep=keep)
    await until(lambda: save.outcome.said.startswith("web is suspended"))  # libxc's part is done
    with pytest.raises(ClaimTaken):
        await hypervisor.resume(8)
    may_go_on.set()
    await save.task
    assert save.guest.resumed == int(keep)


async def test_a_guest_that_is_being_protected_is_not_touched(saving: BeginSave, store: Xenstored) -> None:
    with claimed(8):
        save = await saving(8)
        with pytest.raises(ClaimTaken):
            await save.task
    assert store[CONTROL.format(8)] == ""
    assert save.outcome == Outcome(f"nothing was done: {save.file} is as it was")
    assert save.files() == {"web.save": b"before"}


async def test_a_domain_that_is_not_destroyed_is_told(saving: BeginSave, domains: Domains) -> None:
    domains.may_save.set()
    save = await saving(10)
    with pytest.raises(HypervisorError, match="libxl: no way"):
        await save.task
    assert not save.outcome.good
    assert f"web is saved in {save.file}" in save.outcome.said
    assert save.outcome.said.endswith("bytes; the guest is suspended")


async def test_another_process_that_saves_to_the_same_file_is_not_cut_short(
    saving: BeginSave, domains: Domains
) -> None:
    save = await saving(8)
    another = save.file.with_name("web.save.1.part")  # process 1's
    another.write_bytes(b"head")
    await until(lambda: f"web.save.{os.getpid()}.part" in save.files())
    domains.may_save.set()
    await save.task
    assert sorted(save.files()) == ["web.save", another.name]
    assert another.read_bytes() == b"head"


async def test_a_file_that_cannot_be_written_leaves_the_guest_running(
    saving: BeginSave, domains: Domains, tmp_path: Path
) -> None:
    save = await saving(8)
    await until(lambda: len(save.files()) == 2)
    save.file.unlink()
    (save.file / "in-its-way").mkdir(parents=True)
    domains.may_save.set()
    with pytest.raises(HypervisorError, match="cannot be written"):
        await save.task
    assert save.outcome == Outcome(f"web runs on, and {save.file} is as it was")
    assert save.guest.resumed == 1
