"""Virtual servers and clients: who is let in, who waits, and what becomes of sessions whose servers go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from swarmkit.placement.description import Machine, ModelSize
from swarmkit.simulation.demand import SimulatedRequest
from swarmkit.simulation.distances import clusters
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.petals_client import PetalsRouter
from swarmkit.simulation.rules import PlannedRule
from swarmkit.simulation.swarm import SimulatedSwarm, SwarmHistory
from swarmkit.simulation.virtual_time import StalledError, VirtualClock, run_virtually

MODEL = SimulatedModel(
    name="small",
    size=ModelSize(num_blocks=4, block_bytes=1000, token_bytes=1.0),
    block_gflop=1.0,
    hidden_bytes=0,
)
REQUEST = SimulatedRequest(0.0, prompt_tokens=10, answer_tokens=11)
Spans = dict[str, tuple[int, int]]


def machine(name: str, **changes: float) -> Machine:
    sizes = {"memory_bytes": 1e6, "decode_s": 0.1, "token_s": 0.01, **changes}
    return Machine(name=name, **sizes)


def lived(
    spans: Spans,
    requests: list[SimulatedRequest],
    *machines: Machine,
    event: Callable[[SimulatedSwarm], Awaitable[None]] | None = None,
    petals: bool = False,
    **assumed: float,
) -> SwarmHistory:
    """Serve some blocks, and answer some requests while something happens."""
    assumptions = SwarmAssumptions(overhead_s=0.0, prompt_overhead_s=0.0, **assumed)  # type: ignore[arg-type]
    distances = clusters([10], inside_rtt_s=0.02)

    async def main(clock: VirtualClock) -> SwarmHistory:
        async with anyio.create_task_group() as tasks:
            swarm = SimulatedSwarm(MODEL, distances, PlannedRule(spans), assumptions, clock, tasks)
            for number, one in enumerate(machines or [machine(name) for name in spans]):
                swarm.join(one, number + 1)
            await anyio.sleep(60.0)
            if event is not None:
                tasks.start_soon(event, swarm)
            router = PetalsRouter(0, swarm.look_up, swarm.servers.get, distances, clock) if petals else None
            await swarm.answer_all(requests, [swarm.client(0, router)])
            tasks.cancel_scope.cancel()
        return swarm.finish()

    return run_virtually(main)


def test_an_answer_takes_what_its_steps_take() -> None:
    """The prompt takes 4 x 10 x 10 ms, each of ten more tokens 4 x 100 ms; 10 ms there and 10 ms back."""
    (answer,) = lived({"a": (0, 4)}, [REQUEST]).answers
    assert answer.waited_s == 0
    assert answer.first_token_s == pytest.approx(0.4 + 0.02)
    assert answer.total_s == pytest.approx(0.4 + 10 * 0.4 + 11 * 0.02)


def test_servers_hand_outputs_on_or_the_client_relays_them() -> None:
    chain = {"a": (0, 2), "b": (2, 4)}
    (pushed,) = lived(chain, [REQUEST]).answers
    (relayed,) = lived(chain, [REQUEST], relayed=True).answers
    assert pushed.first_token_s == pytest.approx(0.4 + 0.03)
    assert relayed.first_token_s == pytest.approx(0.4 + 0.04)


def test_a_request_waits_until_a_cache_has_room() -> None:
    """The cache holds one session of 21 tokens in 4 blocks."""
    requests = [REQUEST, SimulatedRequest(0.5, 10, 11)]
    first, second = lived({"a": (0, 4)}, requests, machine("a", memory_bytes=4000 + 4 * 32)).answers
    assert first.waited_s == 0
    assert 0 < second.waited_s < 2 * first.total_s
    assert not second.lost


def test_a_crash_loses_no_session_where_another_server_has_the_blocks() -> None:
    async def crash(swarm: SimulatedSwarm) -> None:
        await anyio.sleep(2.0)
        used = [server for server in swarm.servers.values() if server.places]
        swarm.leave(used[0].machine.name)

    (answer,) = lived({"a": (0, 4), "b": (0, 4)}, [REQUEST], event=crash).answers
    assert (answer.lost, answer.replaced) == (False, 1)
    assert answer.total_s > 4.6  # the prompt and the tokens so far were computed again


async def crash_of_the_first_used(swarm: SimulatedSwarm) -> None:
    """After two seconds, of two servers that are both full: the one whose session came first."""
    await anyio.sleep(2.0)
    places = {name: place for name, one in swarm.servers.items() for place in one.places}
    swarm.leave(min(places, key=lambda name: places[name].opened_at))


def full_servers(tokens: int) -> list[Machine]:
    """Two, with room for one session of so many tokens each."""
    return [machine(name, memory_bytes=4000 + 4 * tokens) for name in ("a", "b")]


def test_a_session_that_lost_its_server_comes_before_those_that_have_waited_for_longer() -> None:
    requests = [SimulatedRequest(0.1 * number, 10, 11) for number in range(4)]
    spans = {"a": (0, 4), "b": (0, 4)}
    history = lived(spans, requests, *full_servers(32), event=crash_of_the_first_used)
    answered = [requests.index(one.request) for one in history.answers]
    assert answered == [1, 0, 2, 3]


def test_a_session_that_lost_its_server_waits_for_room_for_longer_than_a_new_one() -> None:
    """Both first answers take some 76 s, and a new session waits for one minute."""
    requests = [SimulatedRequest(0.1 * number, 10, 181) for number in range(3)]
    spans = {"a": (0, 4), "b": (0, 4)}
    history = lived(spans, requests, *full_servers(208), event=crash_of_the_first_used)
    lost = {requests.index(one.request): one.lost for one in history.answers}
    assert lost == {0: False, 1: False, 2: True}


def test_a_session_stays_with_a_server_that_leaves_until_another_one_has_its_blocks() -> None:
    async def leave(swarm: SimulatedSwarm) -> None:
        await anyio.sleep(2.0)
        swarm.leave("a")
        await anyio.sleep(1.0)
        swarm.join(machine("b"), 2)

    spans = {"a": (0, 4), "b": (0, 4)}
    times = {"notice_s": 30.0, "load_bytes_per_s": 4000.0}
    request = SimulatedRequest(0.0, prompt_tokens=10, answer_tokens=101)
    (answer,) = lived(spans, [request], machine("a"), event=leave, **times).answers
    assert (answer.lost, answer.replaced) == (False, 1)
    # It goes on all the while, but for the prompt and the tokens so far, which are computed again.
    assert answer.total_s < 0.4 + 100 * 0.4 + 101 * 0.02 + 4 * 111 * 0.01


def test_a_session_whose_blocks_nobody_has_is_lost_in_the_end() -> None:
    async def crash(swarm: SimulatedSwarm) -> None:
        await anyio.sleep(2.0)
        swarm.leave("a")

    (answer,) = lived({"a": (0, 4)}, [REQUEST], event=crash).answers
    assert (answer.lost, answer.uncovered) == (True, True)


def test_steps_that_wait_together_run_together() -> None:
    requests = [REQUEST] * 4
    alone = lived({"a": (0, 4)}, requests, machine("a", decode_s=0.1, token_s=0.001), batching=True)
    times = [answer.total_s for answer in alone.answers]
    assert max(times) < 2 * (0.4 * 11)  # one after the other they would take four times as long


def test_petals_clients_ask_again_after_one_two_four_seconds() -> None:
    requests = [REQUEST, SimulatedRequest(0.5, 10, 11)]
    full = machine("a", memory_bytes=4000 + 4 * 32)
    _, second = lived({"a": (0, 4)}, requests, full, petals=True).answers
    assert second.waited_s in (1.0, 3.0, 7.0)


def test_a_program_that_waits_for_nothing_is_told_so() -> None:
    async def main(clock: VirtualClock) -> None:
        await anyio.Event().wait()

    with pytest.raises(StalledError):
        run_virtually(main)
