"""Real server processes are killed in the middle of training, and the loss curve stays the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.events import PeerLost
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.settings import ClientSettings

from .test_gradients import batch

pytestmark = pytest.mark.timeout(300)

STEPS, FIRST_REPLICAS_DIE_AT, OTHERS_DIE_AT = 4, 1, 3


def curve(swarm: LocalSwarm, model: SwarmModelForCausalLM, kill: bool) -> list[float]:
    """The losses of some steps that train a prompt.

    Args:
        kill: let replica 0 of each stage die in one step, and in a later one replica 1, too, before anybody
            has come to serve these blocks in their place.
    """
    ids, _ = batch()
    embeddings = model.get_input_embeddings()(ids).detach()
    prompt = torch.zeros(4, embeddings.shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([prompt], lr=0.05)
    labels = torch.cat([torch.full((len(ids), 4), -100), ids], dim=1)
    losses = []
    with ThreadPoolExecutor(1) as volunteer:
        for step in range(STEPS):
            inputs = torch.cat([prompt.expand(len(ids), -1, -1), embeddings], dim=1)
            loss = model(inputs_embeds=inputs, labels=labels).loss
            if kill and step == FIRST_REPLICAS_DIE_AT:  # between the way there and the way back
                for server in swarm.servers[:2]:
                    server.kill()
            if kill and step == OTHERS_DIE_AT:
                for server in swarm.servers[2:4]:
                    server.kill()
                replaced = volunteer.submit(swarm.add_server)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if kill:
            replaced.result()
    return losses


@pytest.mark.usefixtures("kept_fork_server")
def test_the_loss_curve_is_the_same_when_servers_are_killed(tiny_llama: Checkpoint) -> None:
    settings = ClientSettings().replace(min_step_timeout_s=60)
    with LocalSwarm(tiny_llama, 2, 2, processes=True, client_settings=settings) as swarm:
        model = swarm.model()
        undisturbed = curve(swarm, model, kill=False)
        assert curve(swarm, model, kill=True) == undisturbed
        # Which replica is asked first is the client's choice; in the end it had nobody left to ask.
        assert "server-3" in {event.label for event in model.events if isinstance(event, PeerLost)}
        assert undisturbed[-1] < undisturbed[0]
