"""The benchmark of weights from peers measures what it says: two processes, two hubs that count."""

from __future__ import annotations

from typing import Any

import pytest

from swarmkit.bench.options import Weights
from swarmkit.bench.weights import measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return measure(Weights(blocks=2, hidden_size=64))


def test_the_second_server_asks_the_hub_for_nothing(result: dict[str, Any]) -> None:
    assert result["hub_requests_second"] == 0
    assert result["hub_bytes_second"] == result["hub_other_bytes_second"] == 0


def test_what_the_first_server_had_from_the_hub_the_second_has_from_the_first(result: dict[str, Any]) -> None:
    assert result["hub_requests_first"] > 0
    assert result["peer_bytes_second"] == result["block_bytes"] <= result["hub_bytes_first"] * 1.01
    assert result["same_fingerprint"]
