"""Peers that promise everything and keep nothing, beside honest servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.errors import RemoteError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings

from ..strangers import STRANGE, WORKING, Manner, Stranger, after, refusing
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


REFUSALS = ["bad_message", "bad_shape", "bad_value", "not_finite", "too_large"]


@pytest.fixture
def crowd(swarm: LocalSwarm) -> Iterator[Callable[[Manner], list[Stranger]]]:
    """So many strangers of one manner, until the test ends."""
    strangers: list[Stranger] = []

    def crowd(manner: Manner, number: int = 5) -> list[Stranger]:
        for _ in range(number):
            strangers.append(swarm.add(lambda place: Stranger(place.transport, swarm.checkpoint, manner)))
        return strangers

    yield crowd
    for stranger in strangers:
        stranger.stop()


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("at", ["open", "step"])
def test_strangers_that_call_a_step_malformed_do_not_end_the_answer(
    swarm: LocalSwarm, crowd: Callable[[Manner], list[Stranger]], wanted: torch.Tensor, code: Any, at: str
) -> None:
    crowd(refusing(code, at))
    with swarm.model() as model:
        tokens = answer(model, *prompt(4), new_tokens=4)
    assert torch.equal(tokens, wanted)


def test_a_step_that_is_malformed_is_refused_once_and_its_server_is_not_banned(swarm: LocalSwarm) -> None:
    with swarm.model() as model:
        session = model.session(max_length=8)
        broken = torch.full((1, 2, swarm.checkpoint.hidden_size), float("nan"))
        with pytest.raises(RemoteError, match="NaN") as caught:
            session.step(broken)
        assert caught.value.code == "not_finite"
        assert not model.connection.client.bans.is_banned(swarm.servers[0].peer_id)


# training


def gradient(model: Any) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(TRAINED).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=TRAINED, use_cache=False).loss.backward()
    assert embeddings.grad is not None
    return embeddings.grad


TRAINED = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("manner", ["silent", "absent", "refusing steps as malformed"])
def test_the_gradient_is_the_honest_servers_whatever_the_manner_of_strangers(
    swarm: LocalSwarm,
    crowd: Callable[[Manner], list[Stranger]],
    monkeypatch: pytest.MonkeyPatch,
    manner: str,
) -> None:
    monkeypatch.setenv("SWARMKIT_NET_CONNECT_TIMEOUT_S", "0.5")
    crowd(STRANGE[manner])
    with swarm.model() as model:
        found = gradient(model)
    torch.testing.assert_close(found, gradient(load_local(swarm.checkpoint)), rtol=1e-5, atol=1e-5)
