"""An agent whose hypervisor is the simulated one: ``python -m bench.simulated_agent AGENT_TOML``.

The link, the channels, the arbiter, the engine and the device groups are the real ones; guests cost nothing, so that
what is measured is the agent.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from understudy.agent.agent import Agent
from understudy.arbiter_directory import understudy_arbiters
from understudy.builtin import understudy_intervals
from understudy.config import read_config
from understudy.device import Subkind
from understudy.hookspecs import ArbiterOffer, HypervisorOffer, IntervalOffer, hookimpl
from understudy.hypervisor import HostContext
from understudy.plugins import PluginInfo, Plugins
from understudy.testing.history import SimulatedNetwork
from understudy.testing.hypervisor import SimulatedHypervisor
from understudy.testing.simdevices import simulated_subkinds
from understudy.testing.simhost import Latency, SimulatedHost

__all__ = ["main"]

# A guest that does next to nothing between two checkpoints, and whose checkpoints take no time of their own.
_GUEST_PERIOD_S = 1.0
_LATENCY = Latency(suspend_s=0.0, load_s=0.0, step_s=0.0)


class _Simulation:
    def __init__(self, host: str) -> None:
        self.host = SimulatedHost(
            host, SimulatedNetwork(judging=False), latency=_LATENCY, period_s=_GUEST_PERIOD_S
        )

    @hookimpl
    def understudy_hypervisors(self) -> Sequence[HypervisorOffer]:
        return (HypervisorOffer("simulated", self._make),)

    def _make(self, here: HostContext) -> SimulatedHypervisor:
        return SimulatedHypervisor(here, self.host)

    @hookimpl
    def understudy_subkinds(self) -> Sequence[Subkind]:
        return simulated_subkinds()

    @hookimpl
    def understudy_arbiters(self) -> Sequence[ArbiterOffer]:
        return tuple(understudy_arbiters())

    @hookimpl
    def understudy_intervals(self) -> Sequence[IntervalOffer]:
        return tuple(understudy_intervals())


async def main(path: Path) -> None:
    """Run the agent that `path` configures until SIGTERM."""
    config = read_config(path)
    plugins = Plugins()
    plugins.add(_Simulation(config.host), PluginInfo("simulated", "bench", "0", "bench"))
    agent = Agent(config, plugins)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await agent.start()
    await ended.wait()
    await agent.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
