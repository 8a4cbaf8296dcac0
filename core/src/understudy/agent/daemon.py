"""The agent as a process: configuration, signals, the service manager."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from understudy.agent import logs
from understudy.agent.agent import Agent
from understudy.agent.systemd import notify
from understudy.config import AgentConfig, config_path, read_config
from understudy.plugins import Plugins

__all__ = ["run_agent"]

log = logging.getLogger("understudy.agent")

LET_GO_S = 2.0


def run_agent(config: str | None, log_level: str) -> None:
    """Run the agent of this host until SIGTERM or SIGINT.

    Args:
        config: Path of agent.toml, ``None`` for the default.
        log_level: The least that is logged.

    Raises:
        ConfigError: The configuration is wrong, or its port is taken.
        StateError: Another agent runs here.
    """
    logs.configure(log_level)
    settings = read_config(config_path(config))
    plugins = Plugins.discover(None if settings.plugins is None else sorted(settings.plugins))
    asyncio.run(_run(settings, plugins))


async def _run(settings: AgentConfig, plugins: Plugins) -> None:
    agent = Agent(settings, plugins)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await agent.start()
    notify("READY=1")
    await stop.wait()
    log.info("the agent is being stopped; guests run on")
    notify("STOPPING=1")
    await agent.close()
    await _let_go()


async def _let_go() -> None:
    # asyncio.run would wait for every task; one that does not end although it is cancelled must not keep the process.
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        _, tasks = await asyncio.wait(tasks, timeout=LET_GO_S)
    if tasks:
        log.error("ending although these do not: %s", ", ".join(sorted(task.get_name() for task in tasks)))
        logging.shutdown()
        os._exit(0)
