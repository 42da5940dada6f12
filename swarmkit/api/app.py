"""The application: endpoints, and what they share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from swarmkit._version import __version__
from swarmkit.api.access import Gate, Keys
from swarmkit.api.conversation import ChatModel
from swarmkit.api.endpoints import add_endpoints
from swarmkit.api.engine import AnswerEngine
from swarmkit.api.error_answers import handle_errors, refusal
from swarmkit.api.metrics import ApiMetrics
from swarmkit.api.monitor import add_models, add_monitor
from swarmkit.api.service import ApiService
from swarmkit.api.turns import Turns
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.settings import ApiSettings

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM

logger = logging.getLogger(__name__)

_COUNT_PERIOD_S = 5.0


def create_app(
    model: SwarmModelForCausalLM,
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    local_only: bool = False,
    settings: ApiSettings | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> FastAPI:
    """Make an ASGI application that answers with a model; the model is the caller's, and stays open.

    Args:
        name: what clients call the model; the checkpoint's name if not given.
        aliases: other names under which it answers too.
        api_keys: with any of which clients may use the server; without any, everybody may.
        local_only: answer requests for `localhost` only, as a server without keys on loopback should.
    """
    settings = settings or ApiSettings()
    turns = Turns(settings.max_running, settings.max_waiting)
    metrics = ApiMetrics(model, lambda: turns.running, lambda: turns.waiting)
    engine = AnswerEngine(model, metrics, clock)
    service = ApiService(
        engine=engine,
        chat=ChatModel(engine, settings.max_tokens),
        turns=turns,
        metrics=metrics,
        settings=settings,
        clock=clock,
        names=(name or model.connection.client.model.name, *aliases),
        started=int(clock.time()),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        counting = asyncio.create_task(_count_events(metrics))
        try:
            yield
        finally:
            counting.cancel()
            metrics.close()
            engine.close()

    app = FastAPI(
        title="swarmkit",
        summary="A language model of a swarm, by OpenAI's and Anthropic's protocols.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # whose page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(
        Gate,  # type: ignore[arg-type]
        keys=Keys(api_keys),
        max_body_bytes=settings.max_body_bytes,
        local_only=local_only,
        refuse=refusal,
        count=lambda path, status: metrics.requests.labels(path, str(status)).inc(),
    )
    handle_errors(app)
    add_endpoints(app, service)
    add_models(app, service)
    add_monitor(app, service)
    return app


async def _count_events(metrics: ApiMetrics) -> None:
    """Take events now and then, so that none is dropped where nobody asks for metrics."""
    while True:
        await asyncio.sleep(_COUNT_PERIOD_S)
        metrics.take_events()
