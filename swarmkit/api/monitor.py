"""Endpoints for people and programs that watch: the models, the health, the numbers, and the swarm."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from swarmkit.api.error_answers import told
from swarmkit.api.service import ApiService
from swarmkit.client.fresh_status import FreshStatus
from swarmkit.client.overview import swarm_overview


def add_models(app: FastAPI, service: ApiService) -> None:
    """Add the list of models."""

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "swarmkit",
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(service.started, timezone.utc).isoformat(),
            "max_model_len": service.engine.max_length,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model of this server, under each of its names."""
        data = [described(name) for name in service.names]
        pages = {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return {"object": "list", "data": data, **pages}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        """One of the names."""
        service.check_model(name)
        return described(name)


def add_monitor(app: FastAPI, service: ApiService) -> None:
    """Add what watches the server and its swarm."""
    connection = service.engine.model.connection
    client = connection.client
    status = FreshStatus(connection, clock=service.clock)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether every block of the model has a server: status 200, or else 503."""
        missing = client.known.unserved(0, client.model.num_blocks)
        status = "unavailable" if missing else "ok"
        return JSONResponse({"status": status, "missing_blocks": missing}, 503 if missing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and times for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/swarm.json")
    async def swarm() -> dict[str, Any]:
        """The models of the swarm, their servers, and what would break if one of these left."""
        return swarm_overview(await told(status.get()))
