"""Runs an agent in this process, from its configuration to the end of its federation."""

import asyncio
from collections.abc import Callable

import structlog

from client_agent.agent import Agent, Learn, Outcome, step_back
from client_agent.config import AgentConfig
from client_agent.loading import require_temporary_folder, uncollected
from shelora.private_memory import keep_memory_private
from shelora.stopping import stop_signals
from shelora.telemetry.logs import configure_logs
from shelora.telemetry.metrics import start_metrics_server

_log = structlog.get_logger(__name__)


def run(config: AgentConfig, learning: Callable[[], Learn]) -> Outcome:
    """Takes part until the federation ends, or a signal stops the process.

    Args: learning: What trains; asked for once logs are set up, for it may have to load much.
    Raises: DomainError if something must be changed first: configuration, data, model, identity.
    """
    require_temporary_folder()
    configure_logs("client-agent", config.log.level, json=config.log.json_lines)
    keep_memory_private()
    structlog.contextvars.bind_contextvars(client_id=config.client_id, federation=config.federation)
    step_back(config.resources.nice)
    if config.metrics_port is not None:
        server = start_metrics_server(config.metrics_port, config.metrics_host)
        _log.info("metrics_served", port=server.port)
    outcome = asyncio.run(_followed(config, learning))
    _log.info("agent_ended", outcome=outcome)
    return outcome


async def _followed(config: AgentConfig, learning: Callable[[], Learn]) -> Outcome:
    with uncollected():
        learn = learning()
    agent = Agent(config, learn)
    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, agent.stop)
    return await agent.run()
