"""Tables of requests, of running machines and of distances."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmkit.errors import UsageError
from swarmkit.simulation.demand import read_churn, read_requests
from swarmkit.simulation.distances import clusters, read_topology


def written(folder: Path, text: str) -> Path:
    path = folder / "table"
    path.write_text(text)
    return path


def test_requests_come_at_their_times_after_the_first(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.5000000,4808,10\n2023-11-16 18:17:05.0000000,110,27\n"
    )
    requests = read_requests(written(tmp_path, text))
    assert [(one.at_s, one.prompt_tokens, one.answer_tokens) for one in requests] == [
        (0.0, 4808, 10),
        (1.5, 110, 27),
    ]


def test_each_change_of_running_machines_is_found(tmp_path: Path) -> None:
    changes = read_churn(written(tmp_path, "0,0\n10,0\n10,4\n30,4\n30,1\n"))
    assert [(one.at_s, one.change) for one in changes] == [(10.0, 4), (30.0, -3)]


def test_messages_take_the_shortest_path_of_a_graph(tmp_path: Path) -> None:
    text = (
        "NODES 3\nlabel x y\na 0 0\nb 0 0\nc 0 0\n\nEDGES 3\nlabel src dest weight bw delay\n"
        "edge_0 0 1 1 1000 1000\nedge_1 1 2 1 1000 2000\nedge_2 0 2 1 1000 9000\n"
    )
    assert read_topology(written(tmp_path, text)).seconds(0, 2) == pytest.approx(0.003)


def test_places_of_a_table_are_as_far_apart_as_on_the_globe(tmp_path: Path) -> None:
    text = "latitude,longitude,rtt_ms_from_vantage_1\n0,0,4\n0,90,4\n0,91,4\n"
    places = read_topology(written(tmp_path, text))
    assert places.seconds(0, 1) > 10 * places.seconds(1, 2) > 0
    assert places.seconds(0, 1) == places.seconds(1, 0)


def test_clusters_are_near_inside_and_far_between() -> None:
    places = clusters([1, 2])
    assert (places.seconds(1, 2), places.seconds(0, 1)) == (0.0025, 0.05)


@pytest.mark.parametrize("read", [read_requests, read_churn, read_topology])
def test_another_file_is_refused(read: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="table"):
        read(written(tmp_path, "nothing,of\nthe,kind\n"))  # type: ignore[operator]
