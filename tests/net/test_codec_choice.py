"""Which codec is worth its loss on a link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarmkit.net.protocol.codec import CodecName
from swarmkit.net.protocol.codec_choice import Transfer, choose, smallest

ALL: tuple[CodecName, ...] = ("bfloat16", "float16", "int8")
LAN, DSL = 1e9 / 8, 1e6 / 8
TOKEN = Transfer(1024, 1024, "float32", 0.02, DSL)
"""A token's step over 1 Mbit/s: 33 ms as it is, more than all else."""
PROMPT = Transfer(512 * 1024, 1024, "float32", 1.0, DSL)


@pytest.mark.parametrize("transfer", [TOKEN, PROMPT])
def test_a_slow_link_gets_the_smallest_that_is_allowed(transfer: Transfer) -> None:
    assert choose(ALL, "none", transfer) == "int8"
    assert choose(("bfloat16",), "none", transfer) == "bfloat16"


@pytest.mark.parametrize("transfer", [TOKEN, PROMPT])
def test_a_fast_link_gets_none(transfer: Transfer) -> None:
    assert choose(ALL, "none", replace(transfer, bytes_per_s=LAN)) == "none"


def test_nothing_is_lossy_that_is_not_allowed() -> None:
    assert choose((), "none", PROMPT) == "none"
    assert choose((), "int8", PROMPT) == "none"


def test_a_long_way_makes_small_savings_not_worth_it() -> None:
    """100 Mbit/s, 100 ms: a token's 4 KiB are no burden, a prompt's 2 MiB are."""
    there = 100e6 / 8
    assert choose(ALL, "none", replace(TOKEN, bytes_per_s=there, step_s=0.1)) == "none"
    assert choose(ALL, "none", replace(PROMPT, bytes_per_s=there, step_s=0.3)) == "int8"


@pytest.mark.parametrize("current", ["none", "bfloat16", "int8"])
def test_what_is_not_known_changes_nothing(current: CodecName) -> None:
    assert choose(ALL, current, replace(PROMPT, bytes_per_s=None)) == current


def test_what_is_shorter_already_is_not_made_lossy_for_nothing() -> None:
    half = replace(PROMPT, dtype="bfloat16")
    assert choose(("bfloat16", "float16"), "none", half) == "none"
    assert choose(ALL, "none", half) == "int8"


def test_encoding_that_takes_longer_than_it_saves_is_not_done() -> None:
    assert choose(ALL, "none", replace(PROMPT, bytes_per_s=1e10, step_s=1e-3)) == "none"


def test_between_two_thresholds_nothing_changes() -> None:
    def at(share: float, current: CodecName) -> CodecName:
        """The choice where int8 saves such a share of the step."""
        return choose(("int8",), current, replace(TOKEN, step_s=TOKEN.saved_s("int8") / share))

    assert [at(share, "none") for share in (0.03, 0.07, 0.11)] == ["none", "none", "int8"]
    assert [at(share, "int8") for share in (0.03, 0.07, 0.11)] == ["none", "int8", "int8"]


def test_a_better_codec_replaces_one_that_pays() -> None:
    assert choose(ALL, "bfloat16", TOKEN) == "int8"


@pytest.mark.parametrize(
    ("allowed", "dtype", "wanted"),
    [
        (ALL, "float32", "int8"),
        (("bfloat16",), "float32", "bfloat16"),
        (("bfloat16",), "bfloat16", "none"),
        ((), "float32", "none"),
    ],
)
def test_the_smallest_codec_that_saves_bytes_is_found(
    allowed: tuple[CodecName, ...], dtype: str, wanted: CodecName
) -> None:
    assert smallest(allowed, replace(TOKEN, dtype=dtype)) == wanted
