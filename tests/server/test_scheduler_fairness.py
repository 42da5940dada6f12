"""Everybody is served in the end, and clients alike, however many sessions one of them has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarmkit.net.transport.shares import Holder
from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    FairShares,
    HostShares,
    PassTimes,
    RecentClients,
    Schedule,
    ServedBefore,
    WaitingJob,
    WaitingStep,
    next_schedule,
)

from .scheduling import (
    LIMITS,
    NOBODY,
    READING_S,
    TIMES,
    TOKEN_S,
    decode,
    named,
    prefill,
    times_learnt,
    tokens_for,
    turn_of,
)

# nobody starves


@dataclass
class Work:
    """A step or a job of a simulated client."""

    client: str
    rows: int
    left: int
    decode: bool
    arrived: float
    job: bool = False
    passed_over: int = 0
    gaps: int = 0
    """The most turns that it was passed over in a row."""


class Simulation:
    """A device on which time passes as the model of `TIMES` says, and clients that come at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.waiting: list[Work] = []
        self.finished: list[Work] = []
        self.fair = FairShares()
        self.times = PassTimes()
        self.bulk_passed_over = 0

    def arrive(self) -> None:
        """One more piece of work, of any kind."""
        client = f"client {min(int(self.random.expovariate(0.5)), 9)}"  # some want far more than others
        kind = self.random.choices(["decode", "prefill", "job"], [8, 2, 1])[0]
        tokens = {"decode": self.random.randint(1, 16), "prefill": self.random.randint(17, 2000), "job": 0}[
            kind
        ]
        rows = self.random.choice([1, 1, 1, 4, 60])
        self.waiting.append(Work(client, rows, tokens, kind == "decode", self.now, job=kind == "job"))

    def turn(self) -> Schedule | None:
        steps = [work for work in self.waiting if not work.job]
        jobs = [work for work in self.waiting if work.job]
        served = self.fair.of_present(work.client for work in steps)
        turn = next_schedule(
            [
                WaitingStep(
                    key,
                    ServedBefore(0.0, served[work.client]),
                    work.rows,
                    work.left,
                    work.decode,
                    self.now - work.arrived,
                    work.passed_over,
                )
                for key, work in enumerate(steps)
            ],
            [WaitingJob(key, True, self.bulk_passed_over) for key, _ in enumerate(jobs)],
            NOBODY,
            self.times,
            LIMITS,
        )
        if turn is None:
            return None
        for work in steps:
            work.passed_over += 1
            work.gaps = max(work.gaps, work.passed_over)
        self.bulk_passed_over = 0 if turn.job is not None or not jobs else self.bulk_passed_over + 1
        if turn.job is not None:
            self.finish(jobs[turn.job])
            self.now += 0.05
            return turn
        total = 0
        for scheduled in turn.steps:
            work = steps[scheduled.key]
            work.left -= scheduled.tokens
            work.passed_over = 0
            total += scheduled.tokens * work.rows
            self.fair.serve(work.client, scheduled.tokens * work.rows)
            if not work.left:
                self.finish(work)
        self.times.learn(total, READING_S + total * TOKEN_S)
        self.now += READING_S + total * TOKEN_S
        return turn

    def finish(self, work: Work) -> None:
        self.waiting.remove(work)
        self.finished.append(work)


def seeds(count: int, quick: int) -> list[Any]:
    """The first few always, the others in test-all."""
    return [pytest.param(seed, marks=pytest.mark.slow) if seed >= quick else seed for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(20, 6))
def test_everything_that_arrives_is_finished(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(300):
        world.arrive()
        if world.random.random() < 0.8:
            world.turn()
    while world.turn() is not None:
        pass
    assert len(world.finished) == 300


@pytest.mark.parametrize("seed", seeds(20, 6))
def test_nobody_is_passed_over_without_end(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(600):  # more comes than can be done
        world.arrive()
        world.arrive()
        world.turn()
    waited = [work.gaps for work in (*world.finished, *world.waiting) if work.decode]
    # Its turn comes after 16 others, and then those of its kind that wait as long go before it at most.
    assert max(waited) <= 16 + len(world.waiting)


@pytest.mark.parametrize("seed", range(10))
def test_two_clients_get_the_same_however_many_sessions_one_has(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(7):
        world.waiting.append(Work("greedy", 1, 100_000, False, 0.0))
    world.waiting.append(Work("modest", 1, 100_000, False, 0.0))
    for _ in range(100):
        world.turn()
    left = {work.client: work.left for work in world.waiting}
    assert 100_000 - left["modest"] >= 0.45 * 100 * LIMITS.chunk_tokens


@pytest.mark.parametrize("seed", range(10))
def test_while_somebody_decodes_a_pass_takes_about_twice_as_long_at_most(seed: int) -> None:
    world = Simulation(seed)
    world.times = times_learnt()
    world.waiting.append(Work("long prompt", 1, 3000, False, 0.0))
    took = []
    while any(not work.decode for work in world.waiting):
        world.waiting.append(Work("decoder", 1, 1, True, world.now))
        before = world.now
        world.turn()
        took.append(world.now - before)
    assert max(took) <= 2.1 * (READING_S + TOKEN_S)


def test_a_long_prompt_beside_a_decoder_is_finished_in_time() -> None:
    world = Simulation(0)
    world.waiting.append(Work("long prompt", 1, 3000, False, 0.0))
    turns = 0
    while any(not work.decode for work in world.waiting):
        if not any(work.decode for work in world.waiting):
            world.waiting.append(Work("decoder", 1, 1, True, world.now))
        world.turn()
        turns += 1
    assert turns <= 2 * 3000 * TOKEN_S / READING_S


# shares


def test_a_newcomer_owes_and_is_owed_nothing() -> None:
    shares = FairShares()
    shares.of_present(["old"])
    shares.serve("old", 1000)
    assert shares.of_present(["old", "new"]) == {"old": 1000, "new": 1000}


def test_who_comes_back_still_has_what_was_taken() -> None:
    shares = FairShares()
    shares.of_present(["greedy", "modest"])
    shares.serve("greedy", 1000)
    shares.of_present(["modest"])
    assert shares.of_present(["greedy", "modest"]) == {"greedy": 1000, "modest": 0}


def test_when_nobody_has_stayed_all_begin_anew() -> None:
    shares = FairShares()
    shares.of_present(["greedy"])
    shares.serve("greedy", 1000)
    shares.of_present([])
    assert shares.of_present(["greedy", "new"]) == {"greedy": 0, "new": 0}


def test_clients_that_have_gone_are_forgotten() -> None:
    shares = FairShares()
    for client in range(10_000):
        shares.of_present(["always", f"client {client}"])
        shares.serve("always", 1)
        shares.serve(f"client {client}", 1)
    assert len(shares) < 1000


# decode steps of several clients


def of_client(client: str, *keys: int, **more: object) -> list[WaitingStep]:
    return [replace(decode(key, client=named(client)), **more) for key in keys]  # type: ignore[arg-type]


def keys_of(*steps: WaitingStep, expected: ExpectedArrivals = NOBODY) -> set[int]:
    turn = turn_of(*steps, expected=expected)
    assert turn is not None
    return {piece.key for piece in turn.steps}


def test_a_client_alone_decodes_in_all_of_its_sessions_together() -> None:
    assert len(keys_of(*of_client("one", *range(200)))) == 200


def test_a_client_with_many_sessions_takes_no_more_beside_another_than_the_slowdown_allows() -> None:
    keys = keys_of(*of_client("many", *range(200), passed_over=99), *of_client("one", 999))
    assert 999 in keys
    alone_s, together_s = (READING_S + tokens * TOKEN_S for tokens in (2, len(keys)))
    assert len(keys) > 2
    assert together_s <= LIMITS.decode_slowdown * alone_s


def test_it_takes_no_more_while_the_other_ones_step_is_expected() -> None:
    soon = ExpectedArrivals(((0.5, 1),), 0.5, ((named("one"), 1, 0.5),))
    keys = keys_of(*of_client("many", *range(200)), expected=soon)
    assert READING_S + len(keys) * TOKEN_S <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


def test_it_takes_no_more_beside_a_client_that_has_decoded_lately() -> None:
    turn = next_schedule(of_client("many", *range(200)), (), NOBODY, TIMES, LIMITS, recent={named("one"): 1})
    assert turn is not None
    assert READING_S + len(turn.steps) * TOKEN_S <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


@pytest.mark.parametrize(("in_s", "waits"), [(0.01, True), (-0.005, True), (0.05, False), (-0.05, False)])
def test_a_crowd_waits_for_the_step_of_another_client_that_comes_before_it_would_be_done(
    in_s: float, waits: bool
) -> None:
    soon = ExpectedArrivals(((in_s, 1),), in_s, ((named("one"), 1, in_s),))
    crowd = of_client("many", *range(200), waited_s=9.0)
    assert (turn_of(*crowd, expected=soon) == Schedule()) is waits


@pytest.mark.parametrize(("client", "waits"), [("other", True), ("one", False)])
def test_a_prompt_of_which_nothing_fits_waits_for_another_clients_step(client: str, waits: bool) -> None:
    soon = ExpectedArrivals(((0.001, 1),), -1.0, ((named("one"), 1, 0.001),))
    assert (turn_of(prefill(client=named(client), passed_over=1), expected=soon) == Schedule()) is waits


def test_what_a_crowd_takes_does_not_grow_with_the_time_that_passes_beside_it_took() -> None:
    times = PassTimes()
    times.learn(1, 0.01)
    for tokens in (2, 8):
        times.learn(tokens, 0.1)
    crowd = of_client("many", *range(200))
    turn = next_schedule([*crowd, *of_client("one", 999)], (), NOBODY, times, LIMITS)
    assert turn is not None
    assert len(turn.steps) == 2


def test_who_has_decoded_lately_is_known_for_two_seconds() -> None:
    clients = RecentClients()
    for at in (9.9, 10.0):
        clients.decoded(named("one"), 3, now=at)
        clients.decoded(named("other"), 1, now=at + 1.5)
    assert [
        {client.peer: tokens for client, tokens in clients.at(now).items()} for now in (11.9, 12.1, 14.0)
    ] == [
        {"one": 3, "other": 1},
        {"other": 1},
        {},
    ]


def test_a_single_step_that_tries_a_server_is_no_answer() -> None:
    clients = RecentClients()
    clients.decoded(named("probe"), 1, now=10.0)
    assert not clients.at(10.1)


def test_a_prompt_leaves_room_for_a_client_that_has_decoded_lately() -> None:
    turn = turn_of(prefill(0, client=named("many")), recent={named("one"): 1})
    assert READING_S + tokens_for(0, turn) * TOKEN_S <= 8 * (READING_S + TOKEN_S)


def test_a_prompt_is_cut_so_that_it_takes_little_longer_in_all() -> None:
    tokens = tokens_for(0, turn_of(prefill(0, client=named("many")), recent={named("one"): 1}))
    assert 4096 / tokens * (READING_S + tokens * TOKEN_S) < 1.2 * 4096 / 512 * (READING_S + 512 * TOKEN_S)


def test_a_prompt_of_the_only_client_that_has_decoded_lately_runs_in_whole_chunks() -> None:
    turn = turn_of(prefill(0, client=named("one")), recent={named("one"): 1})
    assert tokens_for(0, turn) == LIMITS.chunk_tokens


def test_clients_with_as_many_sessions_each_all_decode_together() -> None:
    assert len(keys_of(*of_client("one", *range(50)), *of_client("other", *range(50, 100)))) == 100


def test_of_many_sessions_those_that_waited_longest_are_next() -> None:
    late = of_client("many", 7, passed_over=3)
    assert 7 in keys_of(*of_client("many", *range(100, 300)), *late, *of_client("one", 999))


def test_where_passes_are_short_the_messages_of_many_sessions_count() -> None:
    times = PassTimes()
    for tokens in (1, 2, 256):
        times.learn(tokens, 0.005)  # however many run together
    steps = (*of_client("many", *range(200)), *of_client("one", 999))
    turn = next_schedule(steps, (), NOBODY, times, LIMITS)
    assert turn is not None
    assert 2 < len(turn.steps) < 25


# many names of one host


def names(number: int, host: str = "stranger", first: int = 0) -> list[WaitingStep]:
    """A decode step of each of several clients of a host."""
    return [decode(key, client=named(f"name {key}", host)) for key in range(first, first + number)]


HONEST = named("one", "honest")


def chosen(*steps: WaitingStep, **more: Any) -> list[int]:
    turn = turn_of(*steps, **more)
    assert turn is not None
    return [piece.key for piece in turn.steps]


def test_a_hundred_names_of_a_host_take_no_more_beside_another_host_than_the_slowdown_allows() -> None:
    keys = chosen(*names(100), decode(999, client=HONEST))
    assert 999 in keys
    alone_s, together_s = (READING_S + tokens * TOKEN_S for tokens in (1, len(keys)))
    assert together_s <= LIMITS.decode_slowdown * alone_s


def test_nor_beside_a_client_of_another_host_that_has_decoded_lately() -> None:
    keys = chosen(*names(100), recent={HONEST: 1})
    assert READING_S + len(keys) * TOKEN_S <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


def test_where_passes_are_long_a_few_of_a_host_have_a_part_in_each() -> None:
    times = PassTimes()
    for tokens in (1, 2, 4, 8, 16):
        times.learn(tokens, 0.1 * tokens)
    turn = next_schedule([*names(100), decode(999, client=HONEST)], (), NOBODY, times, LIMITS)
    assert turn is not None
    assert 999 in (keys := [piece.key for piece in turn.steps])
    assert len(keys) <= 2 * (4 + 1)


def test_all_names_of_a_host_have_their_turn() -> None:
    shares, left = HostShares(), {step.key: step for step in names(100)}
    honest = decode(999, client=HONEST)
    for _ in range(100):
        served = shares.of_present([HONEST, *(step.client for step in left.values())])
        waiting = [replace(step, served=served[step.client]) for step in (*left.values(), honest)]
        for key in chosen(*waiting):
            shares.serve(HONEST if key == 999 else left[key].client, 1)
            left.pop(key, None)
    assert not left


def test_clients_of_one_host_decode_as_if_they_had_one_each() -> None:
    """Where everybody comes from the same host, clients share as they do from hosts of their own."""
    alike = [*of_client("many", *range(200)), *of_client("one", 999)]
    one_host = [replace(step, client=step.client._replace(host="house")) for step in alike]
    hosts = [replace(step, client=step.client._replace(host=step.client.peer)) for step in alike]
    assert chosen(*alike) == chosen(*one_host) == chosen(*hosts)


def test_a_client_with_many_sessions_takes_no_more_than_a_neighbour_beside_another_host() -> None:
    house = [replace(step, client=named("many", "house")) for step in of_client("many", *range(200))]
    neighbour, other = decode(998, client=named("neighbour", "house")), decode(999, client=HONEST)
    keys = chosen(*house, neighbour, other)
    assert {998, 999} <= set(keys)
    assert READING_S + len(keys) * TOKEN_S <= LIMITS.decode_slowdown * (READING_S + 3 * TOKEN_S)


def test_a_crowd_of_names_does_not_wait_for_more_of_them() -> None:
    soon = ExpectedArrivals(((0.01, 1),), 0.01, ((named("more", "stranger"), 1, 0.01), (HONEST, 1, 9.0)))
    crowd = [replace(step, waited_s=9.0) for step in names(200)]
    assert chosen(*crowd, expected=soon)


def test_a_crowd_of_names_waits_for_another_host() -> None:
    soon = ExpectedArrivals(((0.01, 1),), 0.01, ((HONEST, 1, 0.01),))
    crowd = [replace(step, waited_s=9.0) for step in names(200)]
    assert turn_of(*crowd, expected=soon) == Schedule()


def prompts_served(clients: Sequence[Holder], turns: int) -> dict[Holder, int]:
    """How many pieces of prompts each client has had after so many turns, one prompt for each mention."""
    shares, passed_over = HostShares(), [0] * len(clients)
    pieces = dict.fromkeys(clients, 0)
    for _ in range(turns):
        served = shares.of_present(clients)
        turn = turn_of(
            *(
                replace(
                    prefill(key, 100_000, client=client, passed_over=passed_over[key]), served=served[client]
                )
                for key, client in enumerate(clients)
            )
        )
        assert turn is not None
        passed_over = [turns + 1 for turns in passed_over]
        for piece in turn.steps:
            pieces[clients[piece.key]] += 1
            passed_over[piece.key] = 0
            shares.serve(clients[piece.key], piece.tokens)
    return pieces


def test_the_prompts_of_a_hundred_names_get_as_much_as_one_of_another_host() -> None:
    clients = [*(named(f"name {number}", "stranger") for number in range(100)), HONEST]
    assert prompts_served(clients, 300)[HONEST] == 150


def test_the_prompts_of_a_hundred_names_are_all_read() -> None:
    clients = [*(named(f"name {number}", "stranger") for number in range(100)), HONEST]
    assert min(prompts_served(clients, 300).values()) >= 1


def test_forty_prompts_of_a_client_get_as_much_as_one_of_its_neighbour() -> None:
    neighbour = named("neighbour", "house")
    assert prompts_served([*[named("many", "house")] * 40, neighbour], 200)[neighbour] == 100


def test_a_new_name_owes_what_its_host_has_had() -> None:
    shares = HostShares()
    shares.of_present([old := named("old", "stranger"), HONEST])
    shares.serve(old, 1000)
    served = shares.of_present([new := named("new", "stranger"), HONEST])
    assert served[HONEST] < served[new]


def test_clients_of_a_host_are_owed_nothing_by_their_neighbours() -> None:
    shares = HostShares()
    shares.of_present([old := named("old", "house"), HONEST])
    shares.serve(old, 1000)
    served = shares.of_present([old, new := named("new", "house"), HONEST])
    assert served[new] == served[old]


def test_hosts_that_have_gone_are_forgotten() -> None:
    shares = HostShares()
    for number in range(10_000):
        shares.of_present([always := named("always", "house"), one := named("one", f"host {number}")])
        shares.serve(always, 1)
        shares.serve(one, 1)
    assert len(shares) < 1000
