"""How bytes and answers are counted."""

from __future__ import annotations

import pytest
import torch

from swarmkit.bench.codecs import common_share, wire_bytes
from swarmkit.events import HopTrace, Owner, StepFinished


def step(*carried: tuple[int, int]) -> StepFinished:
    """A step over hops that were sent, and gave back, so many bytes."""
    hops = tuple(HopTrace("peer", "label", 0, 1, 0.0, 0.0, 0.0, sent, received) for sent, received in carried)
    return StepFinished(0, 1, 1, 0.0, hops, False, time=0.0, owner=Owner("session", "peer"))


@pytest.mark.parametrize(
    ("carried", "total"),
    [
        ([(100, 30)], 130),
        ([(100, 30), (40, 50)], 220),  # through the client
        ([(100, 30), (0, 50)], 210),  # the 30 also went on to the next server
    ],
)
def test_bytes_are_counted_on_every_link(carried: list[tuple[int, int]], total: int) -> None:
    assert wire_bytes(step(*carried)) == total


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.25),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([5], [6], 0),
    ],
)
def test_answers_agree_up_to_their_first_difference(one: list[int], other: list[int], share: float) -> None:
    assert common_share(torch.tensor(one), torch.tensor(other)) == share
