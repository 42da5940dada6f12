"""Windows of draft tokens: they pay where they can, and cost next to nothing whatever the world does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmkit.client.speculation.window import (
    ALLOWANCE,
    DRAFTED,
    LONGEST_MATCH,
    MAX_DRAFT_TOKENS,
    Learned,
    Round,
    Windows,
    after,
)

PROMPT = 16
"""Tokens of the prompt in these worlds."""


@dataclass
class World:
    """What steps take, in seconds, and how good draft tokens are.

    Attributes:
        step_s: by the number of its tokens.
        drafting_s: to find so many draft tokens.
        kind: of the draft token after so many tokens.
        right: how many of so many draft tokens are right, after so many tokens.
    """

    step_s: Callable[[int], float]
    right: Callable[[int, int], int]
    drafting_s: Callable[[int], float] = lambda drafted: 0.0
    kind: Callable[[int], int] = lambda tokens: LONGEST_MATCH
    network_s: float = 0.0
    drafting: bool = False


@dataclass
class Told:
    """What became of an answer."""

    took_s: float = 0.0
    without_s: float = 0.0
    """What the same tokens take one by one."""
    rounds: list[Round] = field(default_factory=list)

    @property
    def dearest_s(self) -> float:
        """The longest round with draft tokens."""
        return max((r.step_s + r.drafting_s for r in self.rounds if r.drafted), default=0.0)


def told_in(world: World, tokens: int, learned: Learned | None = None) -> Told:
    """An answer of `tokens` in a world."""
    windows = Windows(learned or Learned(), drafting=world.drafting)
    told = Told()
    prompt = Round(PROMPT, 0, 1, world.step_s(PROMPT), world.network_s, is_prompt=True)
    windows.record(prompt)
    told.took_s = told.without_s = prompt.step_s
    had = 1
    while had < tokens:
        kind = DRAFTED if world.drafting else world.kind(had)
        drafted = windows.choose(kind, min(MAX_DRAFT_TOKENS, tokens - had - 1))
        right = min(world.right(had, drafted), drafted)
        drafting_s = world.drafting_s(drafted) if drafted else 0.0
        round_ = Round(
            drafted + 1, drafted, right + 1, world.step_s(drafted + 1), world.network_s, drafting_s
        )
        windows.record(round_, kind, [number < right for number in range(min(drafted, right + 1))])
        told.rounds.append(round_)
        told.took_s += round_.step_s + drafting_s
        told.without_s += (right + 1) * world.step_s(1)
        had += right + 1
    return told


def linear(plain_s: float, slope_s: float) -> Callable[[int], float]:
    return lambda tokens: plain_s + (tokens - 1) * slope_s


# what it may cost

ADVERSARIES: dict[str, Callable[[random.Random], Callable[[int, int], int]]] = {
    "never right": lambda chance: lambda had, drafted: 0,
    "always right": lambda chance: lambda had, drafted: drafted,
    "right when few are asked": lambda chance: lambda had, drafted: drafted if drafted <= 2 else 0,
    "right until it is trusted": lambda chance: lambda had, drafted: drafted if had < 60 else 0,
    "right now and then": lambda chance: lambda had, drafted: drafted if had % 50 < 12 else 0,
    "by chance": lambda chance: lambda had, drafted: chance.randint(0, drafted),
}
adversaries = st.sampled_from(sorted(ADVERSARIES))
seeds = st.integers(0, 2**16)


@given(
    adversary=adversaries,
    seed=seeds,
    plain_s=st.floats(0.001, 2),
    dearer=st.lists(st.floats(0, 3), min_size=MAX_DRAFT_TOKENS, max_size=MAX_DRAFT_TOKENS),
    finding=st.floats(0, 2),
    way=st.floats(0, 1),
    drafting=st.booleans(),
)
@settings(max_examples=50)
def test_whatever_happens_no_more_than_3_percent_and_one_step_is_lost(
    adversary: str, seed: int, plain_s: float, dearer: list[float], finding: float, way: float, drafting: bool
) -> None:
    """Steps of any number of tokens may take any time, and what is known of it may be quite wrong."""
    chance = random.Random(seed)
    world = World(
        step_s=lambda tokens: (
            plain_s * (1 + (dearer[tokens - 2] if 1 < tokens <= MAX_DRAFT_TOKENS + 1 else 0))
        ),
        right=ADVERSARIES[adversary](chance),
        drafting_s=lambda drafted: plain_s * finding * chance.random(),
        kind=lambda had: chance.randint(1, LONGEST_MATCH),
        network_s=way * plain_s,
        drafting=drafting,
    )
    told = told_in(world, 200)
    assert told.took_s <= (1 + ALLOWANCE) * told.without_s + told.dearest_s


@given(
    adversary=adversaries,
    seed=seeds,
    plain_s=st.floats(0.001, 2),
    computing=st.floats(0, 1),
    slope=st.floats(0, 1),
)
@settings(max_examples=40)
def test_where_a_step_takes_what_it_did_before_no_more_than_3_percent_are_lost_at_any_time(
    adversary: str, seed: int, plain_s: float, computing: float, slope: float
) -> None:
    chance = random.Random(seed)
    world = World(
        step_s=linear(plain_s, plain_s * computing * slope),
        right=ADVERSARIES[adversary](chance),
        kind=lambda had: chance.randint(1, LONGEST_MATCH),
        network_s=plain_s * (1 - computing),
    )
    for tokens in (2, 5, 20, 200):
        told = told_in(world, tokens)
        assert told.took_s <= (1 + ALLOWANCE) * told.without_s * (1 + 1e-9)


def test_what_was_learned_is_no_licence_to_lose_more_the_next_time() -> None:
    learned = Learned()
    world = World(linear(1.0, 0.05), right=lambda had, drafted: drafted, network_s=0.8)
    told_in(world, 200, learned)
    world.right = lambda had, drafted: 0
    told = told_in(world, 50, learned.copy())
    assert told.took_s <= (1 + ALLOWANCE) * told.without_s


def test_a_step_in_which_a_server_was_replaced_is_no_one_s_fault() -> None:
    windows = Windows(Learned())
    windows.record(Round(PROMPT, 0, 1, 1.0, is_prompt=True))
    windows.record(Round(1, 0, 1, 1.0))
    before, cost = windows.balance_s, windows.learned.cost.plain_s
    windows.record(Round(5, 4, 1, 60.0, is_disturbed=True))
    assert (windows.balance_s, windows.learned.cost.plain_s) == (before, cost)


# what it brings


def test_on_a_long_way_text_that_repeats_comes_several_times_faster() -> None:
    """Model M on one thread, three servers, 100 ms apart."""
    world = World(linear(0.27, 0.014), right=lambda had, drafted: drafted, network_s=0.2)
    told = told_in(world, 96)
    assert told.without_s > 3.5 * told.took_s


def test_a_costly_draft_that_is_always_right_is_used_as_far_as_it_pays() -> None:
    world = World(
        linear(0.27, 0.014),
        right=lambda had, drafted: drafted,
        drafting_s=lambda drafted: 0.05 * drafted,
        network_s=0.2,
        drafting=True,
    )
    told = told_in(world, 200)
    assert told.without_s > 2 * told.took_s


@pytest.mark.parametrize("right", [0, MAX_DRAFT_TOKENS])
def test_where_each_token_costs_a_step_next_to_nothing_is_drafted(right: int) -> None:
    told = told_in(World(linear(0.02, 0.02), right=lambda had, drafted: right), 400)
    assert sum(round_.drafted for round_ in told.rounds) <= 8


def test_windows_are_wider_where_steps_are_dear_and_tokens_cheap() -> None:
    def widest(slope_s: float) -> int:
        chance = random.Random(0)

        def right(had: int, drafted: int) -> int:
            return next((n for n in range(drafted) if chance.random() > 0.7), drafted)

        told = told_in(World(linear(0.2, slope_s), right), 2000)
        return max(round_.drafted for round_ in told.rounds[200:])

    assert widest(0.001) > widest(0.02) > widest(0.08)


def test_a_draft_that_never_was_right_is_tried_again_but_rarely() -> None:
    world = World(linear(0.2, 0.01), lambda had, drafted: 0, lambda drafted: 0.01 * drafted, drafting=True)
    told = told_in(world, 1000)
    late = told.rounds[500:]
    tried = [round_ for round_ in late if round_.drafted]
    assert 0 < len(tried) < 0.12 * len(late)
    assert sum(r.step_s + r.drafting_s - 0.2 for r in tried) < 0.015 * sum(r.step_s for r in late)


def test_a_draft_that_becomes_good_is_noticed() -> None:
    world = World(
        linear(0.2, 0.01),
        right=lambda had, drafted: 0 if had < 300 else drafted,
        drafting_s=lambda drafted: 0.01 * drafted,
        drafting=True,
    )
    told = told_in(world, 900)
    assert told.without_s > 1.5 * told.took_s


def test_draft_tokens_that_were_not_made_teach_too() -> None:
    """A lookup that is not worth a try at first is, once it is seen that it would have been right."""
    windows = Windows(Learned())
    windows.record(Round(PROMPT, 0, 1, 0.3, 0.2, is_prompt=True))
    for _ in range(10):
        windows.record(Round(1, 0, 1, 0.25, 0.2), 1, [False])
    assert windows.choose(1, MAX_DRAFT_TOKENS) <= 1  # a trial
    for _ in range(30):
        windows.record(Round(1, 0, 1, 0.25, 0.2), 1, [True])
    assert windows.choose(1, MAX_DRAFT_TOKENS) > 1


def test_now_and_then_a_step_without_draft_tokens_shows_what_that_takes() -> None:
    told = told_in(World(linear(0.2, 0.0), right=lambda had, drafted: drafted), 2000)
    assert sum(not round_.drafted for round_ in told.rounds[-70:]) >= 2


@pytest.mark.parametrize(("kind", "following"), [(DRAFTED, DRAFTED), (1, 2), (LONGEST_MATCH, LONGEST_MATCH)])
def test_a_right_draft_token_makes_the_match_longer(kind: int, following: int) -> None:
    assert after(kind) == following
