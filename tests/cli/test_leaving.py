"""The end of a server as other peers see it: after Ctrl-C, and after its daemon was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from swarmkit import SwarmModelForCausalLM

from ..waiting import wait_until
from .commands import TIMEOUT_S, Running, start

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("kept_fork_server")]

QUESTION = "Tell me a story about a fox."


@dataclass
class Town:
    """A meeting point, and servers in process groups of their own, which announce themselves for an hour."""

    meeting_point: Running
    owned: ExitStack

    def serve(self) -> Running:
        server = start(
            "serve",
            "tiny-chat",
            "--join",
            self.meeting_point.address,
            until="serving_started",
            own_group=True,
        )
        self.owned.callback(_killed, server)
        return server

    def client(self) -> Any:
        return self.owned.enter_context(
            SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=[self.meeting_point.address])
        )


def _killed(server: Running) -> None:
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.communicate(timeout=TIMEOUT_S)


def peer_of(server: Running) -> str:
    peer_id: str = server.event["owner"]["peer_id"]
    return peer_id


def is_in_view(model: Any, server: Running) -> Callable[[], bool]:
    """Whether a client that looks at the swarm now would use a server."""
    connection = model.connection
    return lambda: peer_of(server) in [one.peer_id for one in connection.call(connection.client.known.look)]


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as owned:
        patch.setenv("SWARMKIT_SERVER_ANNOUNCE_PERIOD_S", "1")
        patch.setenv("SWARMKIT_SERVER_RECORD_LIFETIME_S", "3600")
        meeting_point = start("bootstrap", until="listening", own_group=True)
        owned.callback(_killed, meeting_point)
        yield Town(meeting_point, owned)


def test_ctrl_c_in_a_servers_terminal_is_announced_before_it_ends(town: Town) -> None:
    server, model = town.serve(), town.client()
    wait_until(is_in_view(model, server), "the client knows the server", every=0.2)
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    assert server.process.wait(TIMEOUT_S) == 0
    # Its last announcement as one that serves would have lasted for an hour.
    wait_until(lambda: not is_in_view(model, server)(), "the client knows that the server left", every=0.2)


def test_a_server_whose_daemon_is_killed_goes_on_and_is_found_again(town: Town) -> None:
    server, model = town.serve(), town.client()
    wait_until(is_in_view(model, server), "the client knows the server", every=0.2)
    prompt = model.tokenizer()(QUESTION, return_tensors="pt").input_ids
    wanted = model.generate(prompt, max_new_tokens=24, do_sample=False)
    (daemon,) = [child for child in psutil.Process(server.process.pid).children() if child.name() == "p2pd"]
    with model.session(max_length=128) as session:
        first = model.generate(prompt, max_new_tokens=8, do_sample=False)
        daemon.kill()
        rest = model.generate(first, max_new_tokens=16, do_sample=False)
        assert rest.tolist() == wanted.tolist()
        assert session.position > prompt.shape[1]

    def is_served_again() -> bool:
        children = psutil.Process(server.process.pid).children()
        return any(child.name() == "p2pd" and child.pid != daemon.pid for child in children)

    wait_until(is_served_again, "the server has another daemon", every=0.2)
    newcomer = town.client()
    wait_until(is_in_view(newcomer, server), "a new client knows the server", every=0.2)
    answer = newcomer.generate(prompt, max_new_tokens=24, do_sample=False)
    assert answer.tolist() == wanted.tolist()
    assert {hop.peer_id for hop in newcomer.trace[-1].hops} == {peer_of(server)}
