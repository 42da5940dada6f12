"""Beams share the pages of their prompt on every server, with the tokens of the local model."""

from __future__ import annotations

import pytest

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.models.kv.page_table import PAGE_TOKENS, pages_for
from swarmkit.node.server import Server
from swarmkit.server.sessions.service import BlockService

from .answers import answer, at, prompt
from .recovery import a_world, assert_same

PROMPT = 6 * PAGE_TOKENS + 5
NEW_TOKENS = PAGE_TOKENS + 4
BEAMS = 3
OF_COPIES = BEAMS * pages_for(PROMPT + 1)


def test_a_prompt_of_beams_is_computed_once(tiny_llama: Checkpoint) -> None:
    ids, mask = prompt(9, 4, seed=5)
    options = {"num_beams": BEAMS, "new_tokens": 4}
    with a_world(tiny_llama, replicas=1) as world:
        tokens = answer(world.model, ids, mask, **options)
        rows = [step.rows for step in world.model.trace]
    assert_same(tokens, answer(load_local(tiny_llama), ids, mask, **options))
    assert rows == [2, 6, 6, 6]


@pytest.mark.parametrize("killed", [False, True])
def test_beams_share_pages_whatever_becomes_of_their_servers(tiny_llama: Checkpoint, killed: bool) -> None:
    ids, _ = prompt(PROMPT)
    seen: list[int] = []
    with a_world(tiny_llama) as world:

        def services() -> list[BlockService]:
            found = [server.serving.sessions for server in world.swarm.servers if isinstance(server, Server)]
            return [service for service in found if service is not None]

        def look() -> None:
            for service in services():
                service.audit()
                seen.extend(session.cache.pages_held() for session in service.sessions)

        def kill() -> None:
            if killed:
                world.in_use(1).kill()

        actions = {step: lambda: world.on_loop(look) for step in (3, 6, NEW_TOKENS - 1)} | {5: kill}
        tokens = answer(
            world.model, ids, num_beams=BEAMS, new_tokens=NEW_TOKENS, logits_processor=at(actions)
        )
        wanted = answer(load_local(tiny_llama), ids, num_beams=BEAMS, new_tokens=NEW_TOKENS)
    assert_same(tokens, wanted)
    # A server that took over was sent whole rows, and shares what is equal since one of them was repeated.
    assert max(seen[:3] + seen[-3:]) <= pages_for(PROMPT) + 3 * BEAMS < OF_COPIES
