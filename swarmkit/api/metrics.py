"""Numbers for Prometheus: of the API's own requests, and of the events of the model's client."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from swarmkit.events import (
    Event,
    KeysHandedOver,
    PeerLost,
    PeerRefused,
    PeerReplaced,
    Rerouted,
    RoutePlanned,
    StepFinished,
    WaitStarted,
)

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM

_UNREAD_EVENTS = 65_536
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ApiMetrics:
    """Counts requests and tokens as they come, and events when it is asked to take them."""

    def __init__(
        self, model: SwarmModelForCausalLM, running: Callable[[], int], waiting: Callable[[], int]
    ) -> None:
        """Begin to count. `close` ends it.

        Args: running, waiting: how many requests do so now.
        """
        self._registry = registry = CollectorRegistry()
        self._events = model.subscribe(_UNREAD_EVENTS)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"swarmkit_{name}", text, labels, registry=registry)

        def times(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"swarmkit_{name}", text, labels, buckets=_SECONDS, registry=registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"swarmkit_{name}", text, registry=registry).set_function(value)

        gauge("api_requests_running", "Requests that are being answered.", running)
        gauge("api_requests_waiting", "Requests that wait for their turn.", waiting)
        gauge("events_dropped", "Events that were not counted, because too many came.", self._dropped)
        self.requests = counter("api_requests", "Requests, by endpoint and status.", "endpoint", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that servers held already.")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers.")
        self.first_token = times("first_token_seconds", "From the start of an answer to its first token.")
        self.between_tokens = times("between_tokens_seconds", "Between pieces of one answer.")
        self._steps = times("step_seconds", "Steps of sessions, from the client's view.")
        self._hops = times("hop_seconds", "Parts of a step at one server.", "part")
        self._replayed = counter("replayed_tokens", "Tokens sent again to servers that took over.")
        self._changes = counter("route_events", "Events of routes, by kind.", "kind")

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        self.take_events()
        return generate_latest(self._registry)

    def take_events(self) -> None:
        """Count the events since the last call."""
        for event in self._events.pending():
            self._count(event)

    def close(self) -> None:
        """Follow the model's events no longer."""
        self._events.close()

    def _dropped(self) -> float:
        return self._events.dropped

    @functools.singledispatchmethod
    def _count(self, event: Event) -> None:
        """Kinds that are not counted."""

    @_count.register
    def _(self, event: StepFinished) -> None:
        self._steps.observe(event.total_ms / 1e3)
        for hop in event.hops:
            for part, spent in (
                ("queue", hop.queue_ms),
                ("compute", hop.compute_ms),
                ("network", hop.network_ms),
            ):
                self._hops.labels(part).observe(spent / 1e3)

    @_count.register(PeerReplaced)
    @_count.register(Rerouted)
    def _(self, event: Any) -> None:
        self._changes.labels(_kind(event)).inc()
        self._replayed.inc(event.replayed_tokens)

    @_count.register(KeysHandedOver)
    @_count.register(PeerLost)
    @_count.register(PeerRefused)
    @_count.register(RoutePlanned)
    @_count.register(WaitStarted)
    def _(self, event: Event) -> None:
        self._changes.labels(_kind(event)).inc()


def _kind(event: Event) -> str:
    return str(event.to_json()["event"])
