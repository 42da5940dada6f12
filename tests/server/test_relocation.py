"""What announcements say about where servers are about to be."""

from __future__ import annotations

from typing import Any

from swarmkit.net.registry.records import Announcement
from swarmkit.placement.intentions import AnnouncedRun
from swarmkit.server.relocation import announced_runs, as_expected

from ..net.announcements import announcement


def server(name: str, start: int, stop: int, **changes: Any) -> Announcement:
    return announcement(peer_id=name, start=start, stop=stop, **changes)


def test_a_server_that_means_to_move_is_expected_where_it_means_to_go() -> None:
    (moved,) = as_expected("b", [server("a", 0, 2, moving_to=(2, 4))])
    assert moved == server("a", 2, 4, moving_to=(2, 4))


def test_a_server_that_loads_other_blocks_is_expected_there_only() -> None:
    moving = [server("a", 0, 2), server("a", 2, 4, service=1, state="joining")]
    assert [(one.start, one.stop) for one in as_expected("b", moving)] == [(2, 4)]


def test_a_record_without_a_word_of_moving_means_to_stay() -> None:
    """As those of earlier versions."""
    assert announced_runs([server("a", 0, 2)]) == [AnnouncedRun("a", 0, 2)]
