"""One host's agent: what it is made of, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from understudy._version import __version__
from understudy.agent.control import ControlServer
from understudy.agent.figures import Figures
from understudy.agent.guests import GuestFiles
from understudy.agent.history import History
from understudy.agent.memory import RememberingArbiter
from understudy.agent.neighbours import Neighbours
from understudy.agent.operations import WITHDRAW_LIMIT_S, Operations
from understudy.agent.recovery import Recovery
from understudy.agent.telling import Tellings
from understudy.agent.tenure import Tenure
from understudy.engine import Limits, Surroundings
from understudy.errors import ConfigError, LinkError, PluginError, UnderstudyError
from understudy.hypervisor import HostContext
from understudy.link import Links, Timing
from understudy.phases import first_failure, in_words
from understudy.session import TABLES

if TYPE_CHECKING:
    from understudy.arbiter import Arbiter
    from understudy.config import AgentConfig
    from understudy.device import Subkind
    from understudy.hypervisor import GuestConfig, Hypervisor
    from understudy.interval import IntervalPolicy
    from understudy.plugins import Plugins
    from understudy.report import Observer

__all__ = ["Agent"]

log = logging.getLogger("understudy.agent")

# How long the end of the agent waits, once protections are given up, seconds: for engines and requests; for the rest.
END_LIMIT_S = 10.0
LAST_LIMIT_S = 5.0


class Agent:
    """The agent of one host.

    Args:
        config: Its configuration.
        plugins: What is installed and allowed.
        limits: How long its engines wait.

    Raises:
        ConfigError: The configured kind of arbiter is not installed, or refuses its options.
    """

    def __init__(self, config: AgentConfig, plugins: Plugins, *, limits: Limits | None = None) -> None:
        self.config = config
        self.plugins = plugins
        self.host = config.host
        self.life = secrets.token_hex(6)  #: another one for every run
        self.limits = limits or Limits()
        self.problems: list[str] = [_sentence(info) for info in plugins.problems]
        self.arbiter = _make_arbiter(config, plugins)
        self.hypervisors = self._make_hypervisors()
        self.files = GuestFiles(config, self.hypervisors)
        self.history = History(config.directories.state / "history", config.host)
        self.figures = Figures()
        self.telling = Tellings(self.history, self.figures, self._make_observers(), self._progress)
        self.tenures: dict[str, Tenure] = {}
        self.neighbours = Neighbours(self)
        timing = Timing(config.limits.heartbeat_interval_ms / 1000, config.limits.heartbeat_limit_ms / 1000)
        peers = [(peer.name, peer.address, peer.port) for peer in config.peers.values()]
        self.links = Links(config.host, __version__, peers, timing=timing, changed=self.neighbours.changed)
        self.operations = Operations(self)
        self.recovery = Recovery(self)
        self.control = ControlServer(config.socket, self.operations.handle)
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- Life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen to the command line and the other agents, then look after the guests of this host.

        Raises:
            StateError: Another agent runs here.
            ConfigError: The port is taken, the address is not this host's, or a directory cannot be made.
        """
        self._make_directories()
        await self.control.start()
        try:
            await self._listen()
        except BaseException:
            await self.control.close()
            raise
        log.info(
            "agent %s of host %s listens on %s port %d",
            __version__,
            self.host,
            self.config.address,
            self.config.port,
        )
        if self.config.insecure:
            log.warning(
                "insecure = true: what the agents send each other is neither encrypted nor authenticated"
            )
        self.recovery.start()

    async def _listen(self) -> None:
        try:
            await self.links.start(self.config.address, self.config.port)
        except LinkError as error:
            allowed = "an address of this host and a port that nobody else listens on"
            raise ConfigError(str(self.config.source), "listen", str(error), allowed) from error

    async def close(self) -> None:
        """Give up protection in good order, and end. Guests run on.

        Guarantees:
            A guest that this host owned and protected runs on unprotected, unless the arbiter or its hypervisor did
            not answer in time: then it is left as it is, its output held, and the next start of the agent looks after
            it. Copies that this host held are gone, unless their owner could not be reached: then they are left, too.
            Ends after `WITHDRAW_LIMIT_S`, `END_LIMIT_S` and twice `LAST_LIMIT_S` at the latest; what has not ended by
            then is named in the log and left behind.
        """
        await _within(WITHDRAW_LIMIT_S + 1, ("the end of protections", self.operations.withdraw()))
        for task in tuple(self._tasks):
            task.cancel()
        await _within(
            END_LIMIT_S,
            ("the command line", self.control.close()),
            *((task.get_name(), asyncio.wait({task})) for task in self._tasks),
            *((f"the engine of {name}", tenure.close()) for name, tenure in self.tenures.items()),
        )
        arbiter = [] if self.arbiter is None else [("the arbiter", self.arbiter.close())]
        await _within(
            LAST_LIMIT_S, ("the links", self.links.close(f"the agent on {self.host} was stopped")), *arbiter
        )
        await _within(LAST_LIMIT_S, ("the history", asyncio.to_thread(self.telling.close)))

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` as a task that ends with the agent; its failure is logged."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # What was foreseen is told in words; the rest with where it happened.
            foreseen = isinstance(first_failure(error), UnderstudyError)
            log.error(
                "%s failed: %s",
                task.get_name(),
                in_words(first_failure(error)),
                exc_info=None if foreseen else error,
            )

    # --- Guests --------------------------------------------------------------------------------------------------

    def tenure(self, name: str) -> Tenure:
        """Return this host's part in a guest; it is made when it is first asked for."""
        if name not in self.tenures:
            self.tenures[name] = Tenure(
                name, self.host, self.life, self.surroundings, self.neighbours.moved, self.tidy
            )
        return self.tenures[name]

    def tidy(self, name: str) -> None:
        """Remove what a session of a guest may have left empty; nothing of it may be under way."""
        with suppress(OSError):
            (self.config.directories.overlays / name).rmdir()

    def surroundings(self, config: GuestConfig, hypervisor: Hypervisor) -> Surroundings:
        """Return what an engine of a guest may use.

        Raises:
            ConfigError: No arbiter is configured.
        """
        return Surroundings(
            config=config,
            hypervisor=hypervisor,
            arbiter=self.need_arbiter(),
            subkinds=self.subkinds,
            interval=self._interval,
            connect=lambda peer, session: self.neighbours.connect(config, peer, session),
            telling=self.telling,
            tables=TABLES,
            limits=self.limits,
        )

    def need_arbiter(self) -> Arbiter:
        """Return the arbiter.

        Raises:
            ConfigError: None is configured.
        """
        if self.arbiter is None:
            allowed = '[arbiter] with kind = "directory" and a path that all hosts see'
            raise ConfigError(
                str(self.config.source), "arbiter", "is missing: nothing decides who runs a guest", allowed
            )
        return self.arbiter

    def subkinds(self) -> Sequence[Subkind]:
        """Return all ways to protect a device that the plugins offer."""
        return self.plugins.subkinds()

    def _interval(self, config: GuestConfig) -> IntervalPolicy:
        offers = {offer.name: offer for offer in self.plugins.intervals()}
        name = config.protection.interval
        if name not in offers:
            raise ConfigError(
                str(config.source), "protection.interval", f"{name!r} is not installed", ", ".join(offers)
            )
        return offers[name].make(config.protection.interval_options)

    def _progress(self, guest: str, what: str, done_bytes: int, total_bytes: int) -> None:
        self.tenure(guest).told(what, done_bytes, total_bytes)

    # --- What it is made of --------------------------------------------------------------------------------------

    def _make_directories(self) -> None:
        directories = self.config.directories
        for path, mode in (
            (directories.state, 0o755),
            (directories.runtime, 0o755),
            (directories.overlays, 0o700),
        ):
            try:
                path.mkdir(mode=mode, parents=True, exist_ok=True)
            except OSError as error:
                problem = f"{path} cannot be made: {error.strerror}"
                raise ConfigError(str(self.config.source), "directories", problem) from error

    def _make_hypervisors(self) -> Mapping[str, Hypervisor]:
        directories = self.config.directories
        here = HostContext(
            host=self.host,
            address=self.config.address,
            state_directory=directories.state,
            runtime_directory=directories.runtime,
            overlay_directory=directories.overlays,
            bwlimit_bytes_per_s=self.config.limits.bwlimit_bytes_per_s,
        )
        made = {}
        for offer in self.plugins.hypervisors():
            try:
                made[offer.name] = offer.make(here)
            except Exception as error:
                log.exception("hypervisor %s cannot be used", offer.name)
                self.problems.append(f"hypervisor {offer.name} cannot be used: {error}")
        return made

    def _make_observers(self) -> list[tuple[str, Observer]]:
        made = []
        for offer in self.plugins.observers():
            try:
                made.append((offer.name, offer.make()))
            except Exception as error:
                log.exception("observer %s cannot be used", offer.name)
                self.problems.append(f"observer {offer.name} cannot be used: {error}")
        return made

    def warnings(self) -> list[str]:
        """Return what everybody who looks at this host should know."""
        told = list(self.problems)
        if self.config.insecure:
            told.append(
                f"insecure = true on {self.host}: the agents' link is neither encrypted nor authenticated"
            )
        if self.arbiter is None:
            told.append(f"no arbiter is configured on {self.host}: no guest can be started or protected")
        return told


def _make_arbiter(config: AgentConfig, plugins: Plugins) -> RememberingArbiter | None:
    if not config.arbiter_kind:
        return None
    offers = {offer.name: offer for offer in plugins.arbiters()}
    offer = offers.get(config.arbiter_kind)
    if offer is None:
        problem = f"the kind {config.arbiter_kind!r} is not installed"
        raise ConfigError(str(config.source), "arbiter.kind", problem, ", ".join(sorted(offers)))
    made = offer.make(config.arbiter_options, config.host)
    return RememberingArbiter(made, config.directories.state / "generations")


async def _within(limit_s: float, *work: tuple[str, Coroutine[Any, Any, object]]) -> None:
    # Everything at once; nobody waits for what hangs, and what fails keeps nobody from ending.
    names = {asyncio.ensure_future(each): name for name, each in work}
    done, late = await asyncio.wait(names, timeout=limit_s)
    for task in late:
        log.error("the end of the agent does not wait for %s any more, after %g s", names[task], limit_s)
        task.cancel()
    for task in done:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("at the end of the agent: %s: %s", names[task], in_words(first_failure(error)))


def _sentence(info: Any) -> str:
    return str(PluginError(info.name, info.distribution, info.problem))
