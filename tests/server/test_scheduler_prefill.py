"""How much of a long prompt runs next, alone and beside others."""

from __future__ import annotations

import math

import pytest

from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    PassTimes,
    Schedule,
    ScheduledTokens,
    WaitingStep,
    is_decode,
    next_schedule,
)

from .scheduling import (
    LIMITS,
    NOBODY,
    READING_S,
    TIMES,
    TOKEN_S,
    decode,
    prefill,
    tokens_for,
    turn_of,
)

# how much prefill


def test_prefill_goes_in_whole_chunks_when_nobody_decodes() -> None:
    assert turn_of(prefill(tokens=4096)) == Schedule((ScheduledTokens(0, 512),))


def test_a_prefill_that_is_shorter_than_a_chunk_leaves_room_for_the_next() -> None:
    assert turn_of(prefill(0, 400), prefill(1, 400)) == Schedule(
        (ScheduledTokens(0, 400), ScheduledTokens(1, 112))
    )


def test_a_chunk_counts_the_tokens_of_all_rows() -> None:
    assert turn_of(prefill(rows=4)) == Schedule((ScheduledTokens(0, 128, 4),))


def test_more_rows_than_a_chunk_still_go_on() -> None:
    assert turn_of(prefill(rows=1000)) == Schedule((ScheduledTokens(0, 1, 1000),))


def test_those_served_least_are_prefilled_first() -> None:
    assert turn_of(prefill(0, served=9), prefill(1, served=4)) == Schedule((ScheduledTokens(1, 512),))


def test_beside_a_decode_step_prefill_takes_no_longer_than_the_step() -> None:
    tokens = tokens_for(1, turn_of(decode(0), prefill(1)))
    assert tokens == pytest.approx((READING_S + TOKEN_S) / TOKEN_S, abs=2)


def due_in(seconds: float, varies_s: float = 0.0) -> ExpectedArrivals:
    return ExpectedArrivals(((seconds, 1),), seconds - varies_s)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_beside_decode_steps_prefill_fills_a_passs_rows(rows: int) -> None:
    turn = turn_of(decode(0, rows=rows), prefill(1))
    assert (rows + tokens_for(1, turn)) % 4 == 0


def test_before_a_decoder_is_back_prefill_may_go_on_so_long_that_he_waits_as_long_as_his_step_takes() -> None:
    tokens = tokens_for(0, turn_of(prefill(0), expected=due_in(0.1)))
    assert READING_S + tokens * TOKEN_S == pytest.approx(0.1 + READING_S + TOKEN_S, abs=2 * TOKEN_S)


def test_a_decoder_who_may_be_back_sooner_than_usual_waits_no_longer() -> None:
    tokens = tokens_for(0, turn_of(prefill(0), expected=due_in(0.1, varies_s=0.06)))
    assert READING_S + tokens * TOKEN_S == pytest.approx(0.04 + READING_S + TOKEN_S, abs=2 * TOKEN_S)


def test_just_before_a_decoder_is_back_prefill_pauses() -> None:
    assert turn_of(prefill(0), expected=due_in(2 * TOKEN_S)) == Schedule()


def test_before_each_second_step_of_a_decoder_prefill_goes_on_though_it_does_not_fit() -> None:
    assert tokens_for(0, turn_of(prefill(0, passed_over=1), expected=due_in(2 * TOKEN_S))) > 0


def test_prefill_goes_on_when_a_decoder_is_late() -> None:
    assert tokens_for(0, turn_of(prefill(0), expected=ExpectedArrivals(((math.inf, 1),)))) > 0


def test_a_decode_step_that_has_waited_is_not_held_up_further() -> None:
    assert turn_of(decode(0, waited_s=2 * READING_S), prefill(1)) == Schedule((ScheduledTokens(0, 1),))


def test_a_prefill_is_not_left_out_for_long() -> None:
    assert tokens_for(1, turn_of(decode(0, waited_s=2 * READING_S), prefill(1, passed_over=2))) > 0


def test_before_anything_was_measured_prefill_beside_decode_is_careful() -> None:
    turn = next_schedule([decode(0), prefill(1, passed_over=2)], [], NOBODY, PassTimes(), LIMITS)
    assert 0 < tokens_for(1, turn) <= 16


# attention


SHARED_KEYS = AttentionCost(reads=64.0, products=1000.0)
"""Of narrow blocks, in which attention soon outweighs the rest."""


def piece_of(step: WaitingStep, *others: WaitingStep, expected: ExpectedArrivals = NOBODY) -> ScheduledTokens:
    """What runs of a step, beside others."""
    turn = next_schedule((step, *others), (), expected, TIMES, LIMITS, SHARED_KEYS)
    assert turn is not None
    return next(piece for piece in turn.steps if piece.key == step.key)


def many_rows(**more: object) -> WaitingStep:
    return prefill(rows=256, tokens=1, **{"past": 1900, "cuts_rows": True, **more})


def work_of(piece: ScheduledTokens, step: WaitingStep) -> float:
    return SHARED_KEYS.work(piece.rows, piece.tokens, step.past)


def test_many_rows_over_a_long_past_are_no_decode_step() -> None:
    assert is_decode(256, 1, 30, SHARED_KEYS) is True
    assert is_decode(256, 1, 1900, SHARED_KEYS) is False


def test_one_row_decodes_however_long_its_past() -> None:
    assert is_decode(1, 1, 100_000, SHARED_KEYS) is True


def test_a_few_beams_decode() -> None:
    assert is_decode(8, 1, 1900, SHARED_KEYS) is True


def test_many_rows_over_a_long_past_are_cut_by_rows() -> None:
    piece = piece_of(many_rows())
    assert piece.tokens == 1
    assert 1 <= piece.rows < 256
    assert work_of(piece, many_rows()) <= LIMITS.chunk_tokens


def test_beside_a_decode_step_a_piece_takes_no_longer_than_the_slowdown_allows() -> None:
    step = many_rows(key=1, past=400)
    piece = piece_of(step, decode(0))
    together_s = READING_S + (1 + work_of(piece, step)) * TOKEN_S
    assert together_s <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


def test_where_rows_cannot_be_cut_all_go_on_by_a_token() -> None:
    assert piece_of(many_rows(cuts_rows=False)) == ScheduledTokens(0, 1, 256)


def test_the_rows_that_are_left_get_as_many_tokens_as_those_before_them() -> None:
    step = prefill(rows=100, tokens=7, past=1900, cuts_rows=True, keeps_tokens=True)
    assert piece_of(step).tokens == 7


def test_a_piece_is_never_empty() -> None:
    assert piece_of(many_rows(past=10**6)) == ScheduledTokens(0, 1, 1)


def test_a_long_prompt_is_cut_shorter_behind_a_long_past() -> None:
    soon = ExpectedArrivals(((0.5, 1),), 0.2)
    first, later = (piece_of(prefill(past=past, passed_over=1), expected=soon).tokens for past in (0, 10_000))
    assert first > later >= 1


def test_the_attention_of_a_prompt_that_delays_nobody_is_cut_only_where_it_is_most_of_the_work() -> None:
    assert piece_of(prefill(past=2000)).tokens == LIMITS.chunk_tokens
    assert piece_of(prefill(past=50_000)).tokens < LIMITS.chunk_tokens


def test_a_mask_has_a_bound() -> None:
    assert AttentionCost().tokens_within(math.inf, 1, 10**6, 512) == 67
