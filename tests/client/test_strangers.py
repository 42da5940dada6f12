"""Peers that promise everything and keep nothing, beside honest servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings

from ..strangers import STRANGE, WORKING, Stranger, after, refusing
from .answers import answer, prompt

HASTY = ClientSettings().replace(first_step_timeout_s=0.5, min_step_timeout_s=0.5)
HARMLESS = [name for name in STRANGE if name not in ("lying", "replaying")]
"""Manners that a client can see through: wrong numbers of the right form are another matter."""


@pytest.fixture(scope="module")
def swarm(tiny_llama: Checkpoint) -> Iterator[LocalSwarm]:
    """One honest server."""
    with LocalSwarm(tiny_llama, 1, transport="memory", client_settings=HASTY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def stage(tiny_llama: Checkpoint) -> Stage:
    return Stage.load(tiny_llama, 0, tiny_llama.num_blocks)


@pytest.fixture(scope="module")
def wanted(tiny_llama: Checkpoint) -> torch.Tensor:
    tokens: torch.Tensor = answer(load_local(tiny_llama), *prompt(4), new_tokens=4)
    return tokens


def test_a_stranger_that_works_is_used_as_any_server(
    swarm: LocalSwarm, stage: Stage, wanted: torch.Tensor
) -> None:
    stranger = swarm.add(lambda place: Stranger(place.transport, swarm.checkpoint, WORKING, stage=stage))
    with swarm.model() as model:
        tokens = answer(model, *prompt(4), new_tokens=4)
    stranger.stop()
    assert torch.equal(tokens, wanted)
    assert stranger.met["Step"] == 4


@pytest.mark.parametrize("manner", HARMLESS)
def test_the_answer_is_the_honest_servers_whatever_the_manner_of_a_stranger(
    swarm: LocalSwarm, wanted: torch.Tensor, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMKIT_NET_CONNECT_TIMEOUT_S", "0.5")
    stranger = swarm.add(lambda place: Stranger(place.transport, swarm.checkpoint, STRANGE[manner]))
    with swarm.model() as model:
        tokens = answer(model, *prompt(4), new_tokens=4)
    stranger.stop()
    assert torch.equal(tokens, wanted)


def test_a_stranger_may_change_its_manner_within_a_session(
    swarm: LocalSwarm, stage: Stage, wanted: torch.Tensor
) -> None:
    manner = after(2, refusing("not_finite", "step"))
    stranger = swarm.add(lambda place: Stranger(place.transport, swarm.checkpoint, manner, stage=stage))
    with swarm.model() as model:
        tokens = answer(model, *prompt(4), new_tokens=4)
    stranger.stop()
    assert torch.equal(tokens, wanted)
    assert stranger.met["Step"] == 3
