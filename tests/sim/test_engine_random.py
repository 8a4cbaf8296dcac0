"""Random lives of a simulated pair: whatever goes wrong, whenever, no invariant breaks and the guest is served again.

A failing life is repeated by its seed: ``life(1234)``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable

import pytest

from tests.testbeds.rounds import rounds
from understudy.device import Gate, Mode
from understudy.errors import StateError
from understudy.session import PrimaryState, SecondaryState
from understudy.session.events import Prefer, Protect, Unprotect
from understudy.testing import clock
from understudy.testing.arbiter import Silence
from understudy.testing.simhost import SimulatedHost, fails, hangs, takes
from understudy.testing.world import GUEST, HOSTS, SimulatedPair

P, S = PrimaryState, SecondaryState
SEED = int(os.environ.get("UNDERSTUDY_SEED", "1"))
PARTS = 8
DEVICES = tuple(f"{side}.{device}" for side in ("primary", "secondary") for device in ("nic0", "disk0"))
CYCLE = (
    "open",
    "start",
    "postsuspend",
    "checkpoint",
    "preresume",
    "cut",
    "error",
    "commit",
    "stop",
    "teardown",
)
PRIMARYS = ("copy", "replicate", "checkpoint", "sever", "resume_alone", "freeze", "discard")
SECONDARYS = ("launch", "begin", "load", "loaded", "checkpoint", "sever", "promote", "open_outlet", "discard")
STEPS = (
    *(f"primary.{step}" for step in PRIMARYS),
    *(f"secondary.{step}" for step in SECONDARYS),
    *(f"{device}.{step}" for device in DEVICES for step in CYCLE),
    *("start", "kill", "shutdown"),
)


class Life:
    """One random life.

    Args:
        seed: Of everything in it.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        draw = self.random
        mode = draw.choice([Mode.REMUS, Mode.REMUS, Mode.COLO])
        least = 1 if mode is Mode.REMUS else 0
        gates = frozenset(draw.sample(list(Gate), draw.randint(least, 3)))
        self.pair = SimulatedPair(
            mode=mode,
            gates=gates,
            seed=seed,
            nics=draw.randint(1, 2),
            disks=draw.randint(1, 2),
            early_resume=draw.random() < 0.5,
            prefer_primary=draw.random() < 0.1,
        )
        self.pair.cable.jitter_s = draw.choice([0.0, 0.0, 0.003, 0.03])
        self.story: list[str] = [f"{mode.value}, gates {sorted(g.value for g in gates)}"]

    def told(self, what: str) -> None:
        self.story.append(f"{self.pair.now():.3f} {what}")

    async def live(self) -> None:
        pair, draw = self.pair, self.random
        async with pair:
            await pair.start()
            for _ in range(draw.randint(1, 4)):
                await self.protect()
                await asyncio.sleep(draw.choice([0.05, 0.3, 0.8]) * draw.random())
                for _ in range(draw.randint(1, 4)):
                    await draw.choice(self.disasters())()
                    await asyncio.sleep(draw.choice([0.0, 0.005, 0.05, 0.5, 2.0]) * draw.random())
                if draw.random() < 0.7:
                    await self.calm()
            await self.calm()

    # --- What may happen -----------------------------------------------------------------------------------------

    def disasters(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.crash,
            self.crash,
            self.agent_dies,
            self.cut,
            self.mend,
            self.silence,
            self.script,
            self.script,
            self.revive,
            self.guest,
            self.operator,
            self.protect,
        ]

    def host(self) -> str:
        return self.random.choice(HOSTS)

    async def protect(self) -> None:
        for site in self.pair.sites.values():
            if site.alive and site.state in {P.UNPROTECTED, P.ALONE}:
                other = next(name for name in HOSTS if name != site.name)
                self.told(f"protect {site.name}")
                driver = await site.own()
                session = f"session{next(self.pair.sessions)}"
                await self.ask(driver.ask(Protect(session, other, self.pair.prefer_primary)))

    async def ask(self, asking: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(5):
                await asking
        except (StateError, TimeoutError) as error:
            self.told(f"refused: {error}")

    async def crash(self) -> None:
        name, silent = self.host(), self.random.random() < 0.6
        self.told(f"{name} dies{' silently' if silent else ''}")
        self.pair.crash(name, silent=silent)

    async def agent_dies(self) -> None:
        name = self.host()
        self.told(f"{name}'s agent dies")
        self.pair.crash(name, agent_only=True)

    async def revive(self) -> None:
        name = self.host()
        self.told(f"{name} is back")
        await self.pair.revive(name)

    async def cut(self) -> None:
        senders = self.random.choice([("alpha",), ("beta",), HOSTS, HOSTS])
        self.told(f"cable cut from {senders}")
        self.pair.cable.cut(*senders)

    async def mend(self) -> None:
        self.told("cable mended")
        self.pair.mend()

    async def silence(self) -> None:
        view = self.pair.sites[self.host()].arbiter
        how = [self.random.choice([*Silence, None]) for _ in range(self.random.randint(1, 4))]
        self.told(f"arbiter of {view.host}: {how}")
        view.script += how

    async def script(self) -> None:
        host: SimulatedHost = self.pair.sites[self.host()].host
        step = self.random.choice(STEPS)
        kind = self.random.choice(["fails", "hangs", "takes"])
        self.told(f"{host.name} {step} {kind}")
        host.scripts[step] = {"fails": fails(), "hangs": hangs(), "takes": takes(self.random.random())}[kind]

    async def guest(self) -> None:
        site = self.pair.sites[self.host()]
        process = site.host.guests.get(GUEST)
        how = self.random.choice(["shut_down", "reset", "panic", "die"])
        if process is not None and (process.outlet or how == "die"):
            self.told(f"{site.name}'s guest: {how}")
            getattr(process, how)()

    async def operator(self) -> None:
        site = self.pair.sites[self.host()]
        driver = site.driver
        if not site.alive or driver is None:
            return
        what = self.random.choice(["unprotect", "force", "prefer"])
        self.told(f"operator: {what} on {site.name}, {site.state}")
        if what == "force":
            await self.ask(self.pair.force(site.name))
        elif what == "unprotect":
            await self.ask(driver.ask(Unprotect()))
        else:
            await self.ask(driver.ask(Prefer(primary=self.random.random() < 0.5)))

    # --- What must follow ----------------------------------------------------------------------------------------

    async def calm(self) -> None:
        """Nothing fails any more; operators do what they are asked to: the guest is served."""
        pair = self.pair
        self.told("calm")
        for site in pair.sites.values():
            site.host.scripts.clear()
            site.arbiter.script.clear()
            site.arbiter.silence = None
        pair.mend()
        for name in HOSTS:
            await pair.revive(name)
        for attempt in range(30):
            before = pair.network.highest(GUEST)
            await asyncio.sleep(2)
            pair.check()
            if pair.network.highest(GUEST) > before:
                break
            if attempt > 1:
                await self.help_out()
        else:
            states = {name: site.state for name, site in pair.sites.items()}
            raise AssertionError(f"the guest is not served: {states}, {pair.record()}")
        # Nothing is left behind but what belongs to a session that lives.
        if not any(site.state in {P.PROTECTED, P.SYNCING, P.LEAVING} for site in pair.sites.values()):
            await asyncio.sleep(5)
            if not any(site.state in {P.PROTECTED, P.SYNCING, P.LEAVING} for site in pair.sites.values()):
                pair.check(clean=HOSTS)

    async def help_out(self) -> None:
        try:
            async with asyncio.timeout(5):
                self.told(f"help: {await self.pair.decide()}")
        except (StateError, TimeoutError) as error:
            self.told(f"refused: {error}")


def life(seed: int) -> None:
    world = Life(seed)
    try:
        clock.run(world.live())
    except BaseException:
        lines = [f"seed {seed}:", *world.story]
        for at, host, name, facts in world.pair.events[-60:]:
            change = f"{facts.get('from', '')}->{facts.get('to', '')}"
            lines.append(f"{at:.3f} {host} {name} {change} {facts.get('detail', '')}")
        print("\n  ".join(lines))  # noqa: T201 - pytest shows it with the failure
        raise


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(1800)
def test_random_lives(part: int) -> None:
    number = rounds(4, 600)
    for seed in range(SEED * 1_000_000 + part, SEED * 1_000_000 + number * PARTS, PARTS):
        life(seed)
