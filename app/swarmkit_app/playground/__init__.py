"""A page to chat with a model of a swarm, and to watch the swarm while it answers."""

from __future__ import annotations

from swarmkit_app.playground.launch import Playground

__all__ = ["Playground"]
