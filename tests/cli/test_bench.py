"""Every benchmark runs, and its output makes sense. How fast anything is, no test says."""

from __future__ import annotations

from typing import Any

import pytest

from .commands import run, run_here

TINY = ("--rounds", "1", "--json")


def measured(*arguments: str) -> dict[str, Any]:
    """The result of a benchmark."""
    result = run("bench", *arguments, *TINY)
    assert result.returncode == 0, result.stderr
    return result.last_json()


@pytest.mark.slow
def test_decode_fits_a_line_over_the_lengths_of_the_chain() -> None:
    found = measured("decode", "--stages", "1,2", "--tokens", "8")

    assert [row["stages"] for row in found["results"]] == [1, 2]
    assert all(row["tokens_per_s"] > 0 for row in found["results"])
    one, two = (row["added_ms_per_token"] for row in found["results"])
    assert found["fit"]["per_server_ms"] == pytest.approx(two - one, abs=0.01)
    assert found["fit"]["base_ms"] == pytest.approx(2 * one - two, abs=0.01)


@pytest.mark.slow
def test_clients_are_counted_and_their_answers_are_the_local_models() -> None:
    found = measured(*("clients", "--clients", "1,3", "--stages", "1", "--tokens", "4"), "--dtype", "float32")

    (part,) = found["results"]
    assert part["generate"] == {"clients": 3, "equal": 3}
    assert [row["clients"] for row in part["clients"]] == [1, 3]
    assert part["clients"][0]["ratio_to_one"] == 1.0
    assert part["clients"][1]["tokens_per_s"] > 0


@pytest.mark.slow
def test_prefill_waits_for_the_first_token() -> None:
    found = measured("prefill", "--stages", "1", "--prompt-tokens", "64")

    (row,) = found["results"]
    assert row["first_token_s"] > 0
    assert row["ratio_to_local"] == pytest.approx(row["first_token_s"] / row["local_first_token_s"], rel=0.02)


@pytest.mark.slow
def test_a_second_turn_is_measured_with_kept_pages_and_without() -> None:
    found = measured("second-turn", "--history-tokens", "256", "--rounds", "1")

    assert found["equal_answers"] == 1
    assert found["times_faster"] == pytest.approx(
        found["first_token_without_s"] / found["first_token_s"], rel=0.02
    )


@pytest.mark.slow
def test_a_training_step_is_compared_with_the_local_models() -> None:
    found = measured("train", "--batch", "2", "--tokens", "32", "--rounds", "1")

    (row,) = found["results"]
    assert row["both_ratio_to_local"] == pytest.approx(row["both_s"] / row["local_both_s"], rel=0.02)
    # There and back, two servers are sent hidden states, and on the way back a gradient with them.
    assert row["bytes_sent_per_step"] == 6 * 2 * 32 * 256 * 4
    assert row["largest_gradient_difference"] < 1e-5


@pytest.mark.slow
def test_interference_compares_the_same_client_alone_and_beside_another() -> None:
    found = measured("interference", "--stages", "1", "--prefill-tokens", "256", "--tokens", "8")

    assert found["alone"]["steps"] == 8
    assert found["beside"]["steps"] >= 1
    assert found["ratio_p99"] == pytest.approx(found["beside"]["p99_ms"] / found["alone"]["p99_ms"], rel=0.02)


@pytest.mark.slow
def test_over_a_distance_nothing_is_faster_than_its_round_trips() -> None:
    found = measured(
        *("distance", "--stages", "2", "--round-trip-ms", "40", "--tokens", "6", "--prompt-lookup", "2"),
        *("--draft-blocks", "1"),
    )

    assert found["chain"]["tokens_per_s"] < 1e3 / (3 * 20)
    assert found["relayed"]["tokens_per_s"] < 1e3 / (4 * 20)
    assert found["prompt_lookup"]["accepted"] <= found["prompt_lookup"]["drafted"]
    assert all(found[name]["ratio_to_plain"] > 0 for name in ("prompt_lookup", "draft"))
    bound = found["bound_tokens_per_s"]["relayed"]
    assert found["relayed"]["ratio_to_relayed_bound"] == pytest.approx(
        found["relayed"]["tokens_per_s"] / bound, rel=0.02
    )


@pytest.mark.slow
def test_the_links_of_a_distance_carry_the_hidden_states() -> None:
    found = measured("distance", "--stages", "1", "--round-trip-ms", "2", "--tokens", "8")

    generations, prompt_tokens, width, bytes_per_value = 4, 16, 256, 2
    assert found["link_bytes"] > generations * (prompt_tokens + 8 - 1) * width * bytes_per_value


@pytest.mark.slow
def test_codecs_are_compared_in_bytes_answers_and_speed() -> None:
    found = measured(
        *("codecs", "--questions", "2", "--stages", "2", "--tokens", "6", "--megabits", "1"),
        *("--prompt-tokens", "64"),
    )

    none, bfloat16, float16, int8 = found["agreement"]
    assert [row["codec"] for row in found["agreement"]] == ["none", "bfloat16", "float16", "int8"]
    assert (none["equal_answers"], none["equal_tokens"]) == (1.0, 1.0)
    assert none["bytes_per_token"] == 4 * 256 * 4  # to the first, from one to the other, and back from both
    assert bfloat16["ratio_of_bytes"] == float16["ratio_of_bytes"] == 0.5
    assert int8["ratio_of_bytes"] == pytest.approx(33 / 128, abs=1e-4)
    assert int8["max_logit_difference"] > none["max_logit_difference"]
    assert [row["boundaries"] for row in found["speed"][:4]] == [
        [row["codec"]] * 3 for row in found["agreement"]
    ]
    assert found["speed"][4]["codec"] == "where it pays"


@pytest.mark.slow
def test_recovery_is_compared_with_keeping_nothing() -> None:
    found = measured("recovery", "--tokens", "8")

    assert found["ratio_to_without"] == pytest.approx(
        found["tokens_per_s"] / found["tokens_per_s_without"], rel=0.02
    )


@pytest.mark.slow
def test_a_move_is_measured_with_a_handover_and_with_a_replay() -> None:
    found = measured("handover", "--history", "32,64", "--megabits", "1000", "--round-trip-ms", "1")

    short, long = found["results"]
    assert (short["history_tokens"], long["history_tokens"]) == (32, 64)
    assert long["handover_bytes"] > short["handover_bytes"] > 0
    assert all(row["handover_s"] > 0 and row["replay_s"] > 0 for row in found["results"])
    assert short["replay_to_handover"] == pytest.approx(short["replay_s"] / short["handover_s"], rel=0.02)
    assert short["moves_by_choice"] == 1


@pytest.mark.slow
def test_faults_strike_and_the_tokens_are_the_same() -> None:
    found = measured("faults", "--probability", "0.1", "--stages", "1", "--tokens", "24")

    assert found["failed_sends"] > 0
    assert found["servers_lost"] > 0
    assert (found["equal"], found["rounds"]) == (1, 1)


@pytest.mark.slow
def test_a_servers_footprint_is_at_least_its_weights() -> None:
    found = measured("footprint", "--blocks", "2")

    assert found["processes"] == 2  # the server and its p2p daemon
    assert found["memory_bytes"] > found["weights_bytes"] > 0
    assert found["ready_s"] > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_soak_leaves_nothing() -> None:
    result = run(
        *("bench", "soak", "--minutes", "0.4", "--clients", "6", "--processes", "2", "--kill-every", "8"),
        "--json",
        timeout_s=380,
    )
    found = result.last_json()

    assert result.returncode == 0, (found["left"], found["errors"])
    assert found["counts"]["answered"] > 0
    assert found["counts"]["killed"] > 0
    assert (found["left"], found["sound"]) == ([], True)


@pytest.mark.slow
def test_people_get_a_table() -> None:
    result = run("bench", "decode", "--stages", "1", "--tokens", "8", "--rounds", "1")

    assert "ms added per hop" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("decode", "--stages", "0,1"), "as in 1,2,4"),
        (("clients", "--clients", ""), "--clients takes numbers"),
        (("prefill", "--stages", "9"), "cut into 1 to 8 stages"),
    ],
)
def test_a_mistake_gets_one_clear_line(arguments: tuple[str, ...], said: str) -> None:
    result = run_here("bench", *arguments)

    assert result.returncode == 1
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
