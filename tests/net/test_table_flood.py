"""What a flood of well-signed records costs the peer that is to keep them."""

from __future__ import annotations

import pytest

from swarmkit.net.hivemind.storage import MAX_TABLE_BYTES

from .table_flooding import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECORDS = 10_000
"""Of 3.7 KB each."""


def test_a_flood_of_records_costs_a_peer_little_memory_and_no_long_turn() -> None:
    figures = measure(RECORDS)
    print(figures)
    assert figures["taken"] > RECORDS / 10
    assert figures["table_bytes"] <= MAX_TABLE_BYTES
    assert figures["memory_bytes"] < 48 * 2**20
    assert figures["longest_turn_s"] < 0.25
