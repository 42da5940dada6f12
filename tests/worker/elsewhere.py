"""A session that begins at a worker and goes on at another server, and what its tokens have to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from swarmkit import Server, Session, SwarmModelForCausalLM
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings, ServerSettings

PROMPT = torch.arange(5, 25)[None]
BEFORE, AFTER = 8, 24


@contextmanager
def slow_server() -> Iterator[Server]:
    """A server elsewhere in the swarm, which claims to be so slow that sessions begin at the worker's."""
    with Server("tiny-chat", settings=ServerSettings().replace(throughput=0.1)) as server:
        yield server


@contextmanager
def client_of(server: Server) -> Iterator[SwarmModelForCausalLM]:
    """A client of the swarm that a server is in."""
    settings = ClientSettings().replace(speculation="off")  # so that each position is computed once
    with SwarmModelForCausalLM.from_pretrained(
        "tiny-chat", initial_peers=server.addresses, settings=settings
    ) as model:
        yield model


def more(model: SwarmModelForCausalLM, session: Session, tokens: Tensor, count: int) -> Tensor:
    """Go on with a session by so many tokens."""
    result = model.generate(
        tokens, session=session, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    assert isinstance(result, Tensor)
    return result


def expected(count: int) -> list[int]:
    """What the prompt goes on with, computed here alone."""
    local = load_local(Checkpoint.open("tiny-chat"))
    tokens = local.generate(PROMPT, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return tokens[0].tolist()
