"""The model that a command talks to: over the swarm of `--join`, or over a swarm in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from swarmkit.cli import console
from swarmkit.cli.interrupt import interruptible

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.speculation.assistants import Speculation


@contextmanager
def model_of(
    name: str,
    join: list[str] | None,
    swarm_key: str | None = None,
    identity: str | None = None,
    allow: list[str] | None = None,
    block: list[str] | None = None,
) -> Iterator[Any]:
    """The model over the swarm of `join`, or over a swarm of two servers in this process.

    Args:
        swarm_key: the file with the key of a private swarm.
        identity: the file with the client's key.
        allow, block: peer ids of the only servers to use, and of servers never to use.
    """
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.local.swarm import LocalSwarm

    if join:
        with console.busy("joining the swarm"):
            model = SwarmModelForCausalLM.from_pretrained(
                name,
                initial_peers=join,
                swarm_key=swarm_key,
                identity_path=identity,
                allowed_servers=allow or (),
                blocked_servers=block or (),
            )
        with model, interruptible():
            yield model
        return
    with console.busy("no --join: starting a swarm of two servers in this process"):
        swarm = LocalSwarm(name, num_stages=2).start()
    with swarm:
        model = swarm.model()
        with interruptible():
            yield model


def speculation_of(
    model: SwarmModelForCausalLM, speculate: Speculation | None, draft: str | None
) -> dict[str, Any]:
    """Options of `generate()` for `--speculate` and `--draft`; shows that a draft model is being loaded."""
    from swarmkit.client.chat import draft_options

    if draft is None:
        return draft_options(model, None, speculate)
    with console.busy(f"loading the draft {draft}"):
        return draft_options(model, draft, speculate)
