"""Which servers count as staying, and when a server is needed where it is."""

from __future__ import annotations

from typing import Any

from swarmkit.net.registry.records import Announcement
from swarmkit.server.relocation import needed_for, staying

from ..net.announcements import announcement


def server(name: str, start: int, stop: int, **changes: Any) -> Announcement:
    return announcement(peer_id=name, start=start, stop=stop, **changes)


def test_a_server_that_loads_other_blocks_is_not_counted_where_it_is() -> None:
    moving = [server("a", 0, 2), server("a", 2, 4, service=1, state="joining")]
    assert [(one.start, one.stop) for one in staying([*moving, server("b", 4, 6)])] == [(2, 4), (4, 6)]


def test_a_newcomer_counts_while_it_loads() -> None:
    assert staying([server("a", 0, 2, state="joining")]) == [server("a", 0, 2, state="joining")]


def test_blocks_that_another_server_has_need_nobody_else() -> None:
    assert needed_for((0, 2), [server("a", 0, 4)]) == []


def test_blocks_without_another_server_need_this_one() -> None:
    assert needed_for((0, 4), [server("a", 0, 2)]) == [(2, 4)]


def test_a_peer_with_two_ranges_may_be_leaving_one() -> None:
    assert needed_for((0, 2), [server("a", 0, 2), server("a", 2, 4, service=1)]) == [(0, 2)]
