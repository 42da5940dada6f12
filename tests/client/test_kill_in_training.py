"""Real server processes are killed in the middle of training, and the loss curve stays the same."""

from __future__ import annotations

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.models.checkpoint import Checkpoint
from swarmkit.settings import ClientSettings

from .test_gradients import batch

pytestmark = pytest.mark.timeout(300)

STEPS, KILL_AT = 6, 2


def curve(swarm: LocalSwarm, model: SwarmModelForCausalLM, kill: bool) -> list[float]:
    """The losses of some steps that train a prompt; in one of them, one replica of each stage may die."""
    ids, _ = batch()
    embeddings = model.get_input_embeddings()(ids).detach()
    prompt = torch.zeros(4, embeddings.shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([prompt], lr=0.05)
    labels = torch.cat([torch.full((len(ids), 4), -100), ids], dim=1)
    losses = []
    for step in range(STEPS):
        inputs = torch.cat([prompt.expand(len(ids), -1, -1), embeddings], dim=1)
        loss = model(inputs_embeds=inputs, labels=labels).loss
        if kill and step == KILL_AT:  # between the way there and the way back
            for server in swarm.servers[: len(swarm.servers) // 2]:
                server.kill()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_is_the_same_when_servers_are_killed(tiny_llama: Checkpoint) -> None:
    settings = ClientSettings(min_step_timeout=60)
    with LocalSwarm(tiny_llama, 2, 2, processes=True, client_settings=settings) as swarm:
        model = swarm.model()
        undisturbed = curve(swarm, model, kill=False)
        assert curve(swarm, model, kill=True) == undisturbed
        assert len(model.events) >= 2  # that servers were lost was noticed
        assert undisturbed[-1] < undisturbed[0]
