"""Machines lose the network, change addresses, sleep, and have wrong clocks; sessions and servers go on.

Real `swarmkit serve` processes and a client, each on a machine of its own in network namespaces. Where these
cannot be had (they need Linux, root, and the `ip` command), the tests skip with the reason.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmkit.local.server_process import ServerProcess
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings, ServerSettings

from .models.tiny import make_checkpoint
from .namespaces import ClientProcess, Lan, Machine

pytestmark = pytest.mark.timeout(600)

Undisturbed = Callable[..., list[int]]

PROMPT = (5, 9, 12, 7)
QUICK = ClientSettings().replace(refresh_period_s=1.0, route_timeout_s=150.0)
LIVELY = ServerSettings().replace(announce_period_s=1.0, record_lifetime_s=5.0, throughput=100.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Checkpoint) -> Undisturbed:
    """What the local model answers."""
    local: Any = load_local(checkpoint)

    def tokens(new_tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
        ids = torch.tensor([prompt])
        found: list[int] = local.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            no_repeat_ngram_size=2,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )[0].tolist()
        return found

    return tokens


class Swarm:
    """A swarm of two servers, one for each half of the model, and a client, on three machines."""

    def __init__(self, lan: Lan, checkpoint: Checkpoint, listen: str = "") -> None:
        self.model = checkpoint.name
        self.lan = lan
        self.first, self.second, self.user = (lan.machine() for _ in range(3))
        self.servers: list[ServerProcess] = [
            self.first.serve(self.model, (0, 2), settings=LIVELY, listen=listen)
        ]
        self.servers.append(self.second.serve(self.model, (2, 5), self.join, LIVELY, listen=listen))
        self.client: ClientProcess = self.user.client(self.model, self.join, QUICK)

    @property
    def join(self) -> list[str]:
        return self.address_of(0)

    def address_of(self, number: int) -> list[str]:
        """Where other machines reach a server, which also listens where only its own one reaches it."""
        machine = (self.first, self.second)[number]
        return [a for a in self.servers[number].addresses if f"/{machine.address}/" in a][:1]

    @property
    def machines(self) -> list[Machine]:
        return self.lan.machines


@pytest.fixture(scope="module")
def swarm(checkpoint: Checkpoint) -> Iterator[Swarm]:
    with Lan() as lan:
        yield Swarm(lan, checkpoint)


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Iterator[Swarm]:
    """A swarm for one test, after which it may be in any state. Its servers listen at every address."""
    with Lan() as lan:
        yield Swarm(lan, checkpoint, listen="0.0.0.0")


def gone_for(seconds: float, machine: Machine) -> None:
    """A machine has no network for so long."""
    machine.cut()
    time.sleep(seconds)
    machine.heal()


# what takes seconds


def test_a_session_goes_on_after_the_client_was_without_network_for_seconds(
    swarm: Swarm, undisturbed: Undisturbed
) -> None:
    swarm.client.ask(12, pause_s=0.1, prompt=PROMPT)
    swarm.client.wait_for("token")
    gone_for(3, swarm.user)
    assert swarm.client.tokens() == undisturbed(12)


@pytest.mark.slow
def test_a_session_goes_on_after_a_server_was_without_network_for_seconds(
    swarm: Swarm, undisturbed: Undisturbed
) -> None:
    swarm.client.ask(12, pause_s=0.1, prompt=PROMPT)
    swarm.client.wait_for("token")
    gone_for(3, swarm.second)
    assert swarm.client.tokens() == undisturbed(12)


@pytest.mark.slow
def test_a_client_that_was_cut_off_says_so_and_finds_the_swarm_again(
    swarm: Swarm, undisturbed: Undisturbed
) -> None:
    hasty = swarm.user.client(swarm.model, swarm.join, QUICK.replace(route_timeout_s=4.0))
    assert hasty.answer(4, prompt=PROMPT) == undisturbed(4)
    swarm.user.cut()
    hasty.ask(6, prompt=PROMPT)
    message = hasty.wait_for("error")["message"]
    swarm.user.heal()
    assert "this client has no contact with the swarm" in message
    assert hasty.answer_at_last(6, prompt=PROMPT) == undisturbed(6)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 12])
@pytest.mark.parametrize(
    "which", ["user to second", "second to user", "first to second", "second to first"], ids=str
)
def test_a_session_goes_on_after_one_direction_was_dropped_for_seconds(
    fresh: Swarm, undisturbed: Undisturbed, which: str, seconds: float
) -> None:
    silent, unreached = (getattr(fresh, name) for name in which.split(" to "))
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    silent.stop_reaching(unreached)
    time.sleep(seconds)
    silent.reach_again(unreached)
    assert fresh.client.tokens() == undisturbed(12)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["user to second", "second to user"], ids=str)
def test_a_session_goes_on_at_another_server_if_one_direction_stays_dropped(
    fresh: Swarm, undisturbed: Undisturbed, which: str
) -> None:
    silent, unreached = (getattr(fresh, name) for name in which.split(" to "))
    fresh.client.ask(60, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    spare = fresh.lan.machine().serve(
        fresh.model, (2, 5), fresh.join, LIVELY.replace(throughput=1.0), listen="0.0.0.0"
    )
    silent.stop_reaching(unreached)
    assert fresh.client.tokens() == undisturbed(60)
    assert spare.alive


# what takes longer

OUTAGES = [12, 25, 120]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", OUTAGES)
@pytest.mark.parametrize("which", ["user", "first", "second"])
def test_a_session_goes_on_after_a_long_outage(
    fresh: Swarm, undisturbed: Undisturbed, which: str, seconds: float
) -> None:
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    gone_for(seconds, getattr(fresh, which))
    assert fresh.client.tokens() == undisturbed(12)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["user", "first", "second"])
def test_a_session_goes_on_at_another_address(fresh: Swarm, undisturbed: Undisturbed, which: str) -> None:
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    getattr(fresh, which).set_address(77)
    assert fresh.client.tokens() == undisturbed(12)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["user", "first", "second"])
def test_a_session_goes_on_after_a_daemon_was_killed(
    fresh: Swarm, undisturbed: Undisturbed, which: str
) -> None:
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    getattr(fresh, which).signal(signal.SIGKILL, "p2pd")
    assert fresh.client.tokens() == undisturbed(12)
    assert fresh.client.answer(13, prompt=PROMPT) == undisturbed(13)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["user", "first", "second"])
def test_a_session_goes_on_after_a_daemon_hung(fresh: Swarm, undisturbed: Undisturbed, which: str) -> None:
    machine: Machine = getattr(fresh, which)
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    machine.signal(signal.SIGSTOP, "p2pd")
    time.sleep(45)
    machine.signal(signal.SIGCONT, "p2pd")
    assert fresh.client.tokens() == undisturbed(12)
    assert fresh.client.answer(13, prompt=PROMPT) == undisturbed(13)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_session_goes_on_after_a_server_was_restarted_under_its_identity(
    fresh: Swarm, undisturbed: Undisturbed, which: str
) -> None:
    machine: Machine = getattr(fresh, which)
    number = [fresh.first, fresh.second].index(machine)
    server = fresh.servers[number]
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    machine.end()
    join = fresh.address_of(1 - number)
    again = machine.serve(fresh.model, server.blocks, join, LIVELY, listen="0.0.0.0")
    assert again.peer_id == server.peer_id
    assert fresh.client.tokens() == undisturbed(12)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["user", "all"])
def test_a_session_goes_on_after_a_sleep_of_two_minutes(
    fresh: Swarm, undisturbed: Undisturbed, which: str
) -> None:
    asleep = [fresh.user] if which == "user" else fresh.machines
    fresh.client.ask(12, pause_s=0.1, prompt=PROMPT)
    fresh.client.wait_for("token")
    for machine in asleep:
        machine.signal(signal.SIGSTOP)
    time.sleep(120)
    for machine in asleep:
        machine.signal(signal.SIGCONT)
    assert fresh.client.tokens() == undisturbed(12)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("which", ["user", "first", "second"])
def test_a_clock_that_is_set_isolates_no_peer(
    fresh: Swarm, undisturbed: Undisturbed, which: str, hours: int
) -> None:
    getattr(fresh, which).set_clock(hours * 3600.0)
    time.sleep(8)
    assert fresh.client.answer(8, prompt=PROMPT) == undisturbed(8)
    newcomer = fresh.lan.machine().client(fresh.model, fresh.join, QUICK)
    assert newcomer.answer(8, prompt=PROMPT) == undisturbed(8)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_client_whose_clock_is_wrong_joins(fresh: Swarm, undisturbed: Undisturbed, hours: int) -> None:
    machine = fresh.lan.machine()
    machine.set_clock(hours * 3600.0)
    newcomer = machine.client(fresh.model, fresh.join, QUICK)
    assert newcomer.answer(8, prompt=PROMPT) == undisturbed(8)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_server_whose_clock_is_wrong_joins(fresh: Swarm, undisturbed: Undisturbed, hours: int) -> None:
    machine = fresh.lan.machine()
    machine.set_clock(hours * 3600.0)
    fresh.second.end()
    machine.serve(fresh.model, (2, 5), fresh.join, LIVELY)
    assert fresh.client.answer(8, prompt=PROMPT) == undisturbed(8)


LONG_PROMPT = tuple(3 + number * 7 % 50 for number in range(400))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ipv6": True}, {"mtu": 1280}, {"ipv6": True, "mtu": 1280}], ids=str)
def test_networks_that_are_unusual(
    checkpoint: Checkpoint, undisturbed: Undisturbed, options: dict[str, Any]
) -> None:
    with Lan(**options) as lan:
        swarm = Swarm(lan, checkpoint)
        assert swarm.client.answer(6, prompt=LONG_PROMPT) == undisturbed(6, LONG_PROMPT)
