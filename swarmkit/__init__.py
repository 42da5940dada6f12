"""swarmkit: run and fine-tune language models that are too big for any one of your machines.

The public names load on first use, so that `import swarmkit` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from swarmkit._version import __version__
from swarmkit.client import viewing
from swarmkit.lazy import lazy_names

if TYPE_CHECKING:
    from swarmkit.client.adapters.peft import DeepPrompts, get_peft_model, load_adapter
    from swarmkit.client.model import SwarmModelForCausalLM, SwarmModelForSequenceClassification
    from swarmkit.client.session.session import Session
    from swarmkit.errors import NoRouteError, PeerError, SwarmkitError, UsageError
    from swarmkit.local.swarm import LocalSwarm
    from swarmkit.node.server import Server

_HOMES = {
    "DeepPrompts": "swarmkit.client.adapters.peft",
    "LocalSwarm": "swarmkit.local.swarm",
    "NoRouteError": "swarmkit.errors",
    "PeerError": "swarmkit.errors",
    "Server": "swarmkit.node.server",
    "Session": "swarmkit.client.session.session",
    "SwarmModelForCausalLM": "swarmkit.client.model",
    "SwarmModelForSequenceClassification": "swarmkit.client.model",
    "SwarmkitError": "swarmkit.errors",
    "UsageError": "swarmkit.errors",
    "get_peft_model": "swarmkit.client.adapters.peft",
    "load_adapter": "swarmkit.client.adapters.peft",
}

__all__ = [
    "DeepPrompts",
    "LocalSwarm",
    "NoRouteError",
    "PeerError",
    "Server",
    "Session",
    "SwarmModelForCausalLM",
    "SwarmModelForSequenceClassification",
    "SwarmkitError",
    "UsageError",
    "__version__",
    "get_peft_model",
    "load_adapter",
]

viewing.offer(lambda: import_module("swarmkit.notebook.answer").generate_shown)

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
