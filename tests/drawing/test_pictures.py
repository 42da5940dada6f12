"""Drawings are well-formed, say in words what they show, and take no text of a peer for markup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from swarmkit.drawing.bundle import bundle, table
from swarmkit.drawing.loss_curve import LossCurve
from swarmkit.drawing.pipeline import pipeline_rows, pipeline_svg, pipeline_text
from swarmkit.drawing.servers import MOST_LANES, lanes
from swarmkit.drawing.swarm import coverage, least_covered, swarm_rows, swarm_svg, swarm_text
from swarmkit.drawing.timeline import timeline_rows, timeline_svg, timeline_text
from swarmkit.drawing.training import training_svg, training_text
from swarmkit.drawing.values import (
    HopPicture,
    PipelinePicture,
    ServerPicture,
    StepPicture,
    TrainingPicture,
)

HOSTILE = "<script>alert('1')</script>\" onload=x &"

HOP = HopPicture("peer-a", "cedar", 0, 4, queue_ms=0.5, compute_ms=3.0, network_ms=1.5)
LOST = HopPicture("peer-b", "birch", 4, 8, state="lost", reason="connection lost")
SERVERS = [ServerPicture("peer-a", "cedar", 0, 4), ServerPicture("peer-c", "maple", 2, 8, throughput=90.0)]
PIPELINE = PipelinePicture("tiny-chat", 8, [HOP, LOST], SERVERS, 12, 31.25, ["lost birch [4:8]"])
STEP = StepPicture(1, 10, 1, 5.0, [HOP])


def texts(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


def big_pipeline() -> PipelinePicture:
    servers = [ServerPicture(f"p{n}", f"server-{n}", n % 79, n % 79 + 2) for n in range(300)]
    hops = [HopPicture(f"p{n}", f"server-{n}", n, n + 1, compute_ms=n) for n in range(80)]
    return PipelinePicture("big", 80, hops, servers)


@pytest.mark.parametrize(
    "svg",
    [
        pipeline_svg(PIPELINE),
        pipeline_svg(PIPELINE, phase=0.5),
        pipeline_svg(PipelinePicture("empty", 0)),
        pipeline_svg(big_pipeline()),
        swarm_svg("tiny-chat", 8, SERVERS),
        swarm_svg("tiny-chat", 8, []),
        timeline_svg([STEP, replace(STEP, number=2, recovered=True, total_ms=50.0)]),
        timeline_svg([]),
        training_svg(TrainingPicture([3.0, float("nan"), 1.0], 10.0, {"cedar": 3})),
        training_svg(TrainingPicture()),
    ],
    ids=[
        "pipeline",
        "moving",
        "empty",
        "large",
        "swarm",
        "no-server",
        "timeline",
        "no-step",
        "training",
        "no-loss",
    ],
)
def test_a_drawing_is_well_formed_and_has_a_description(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda label: pipeline_svg(replace(PIPELINE, hops=[replace(HOP, label=label)], messages=[label])),
        lambda label: pipeline_svg(replace(PIPELINE, hops=[replace(LOST, reason=label)])),
        lambda label: swarm_svg(label, 8, [replace(SERVERS[0], label=label, state="joining")]),
        lambda label: timeline_svg([replace(STEP, hops=[replace(HOP, label=label)])]),
        lambda label: training_svg(TrainingPicture(shares={label: 1})),
    ],
    ids=["label", "reason", "swarm", "timeline", "training"],
)
def test_text_of_a_peer_is_never_markup(draw: Callable[[str], str]) -> None:
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(draw(HOSTILE)).iter()}
    assert names <= {"svg", "g", "rect", "text", "line", "circle", "polyline", "title"}


def test_a_table_escapes_its_cells() -> None:
    assert "<script>" not in table([("name",), (HOSTILE,)])


def test_a_lost_server_is_told_without_colour() -> None:
    assert "✕ birch" in texts(pipeline_svg(PIPELINE))
    assert "connection lost" in texts(pipeline_svg(PIPELINE))


def test_a_replacement_is_told_without_colour() -> None:
    assert "↻ cedar" in texts(pipeline_svg(replace(PIPELINE, hops=[replace(HOP, state="new")])))


def test_the_time_of_a_hop_is_in_figures() -> None:
    drawn = texts(pipeline_svg(PIPELINE))
    assert "5.0 ms" in drawn
    assert "queue 0.5, compute 3.0, network 1.5 ms" in drawn


def test_the_text_of_a_pipeline_has_speed_and_route() -> None:
    text = pipeline_text(PIPELINE)
    assert text == "tiny-chat · 8 blocks · 12 tokens · 31.2 tokens/s; route: cedar [0:4] → ✕ birch [4:8]"


def test_the_table_of_a_pipeline_has_a_row_for_each_hop() -> None:
    assert pipeline_rows(PIPELINE)[1:] == [
        ("cedar", "0:4", "0.5", "3.0", "1.5", "serving"),
        ("birch", "4:8", "0.0", "0.0", "0.0", "connection lost"),
    ]


def test_coverage_counts_servers_that_are_online() -> None:
    servers = [*SERVERS, ServerPicture("peer-d", "oak", 0, 8, "joining")]
    assert coverage(8, servers) == [1, 1, 2, 2, 1, 1, 1, 1]


def test_blocks_beyond_the_model_are_not_counted() -> None:
    assert coverage(2, [ServerPicture("peer-a", "cedar", -1, 9)]) == [1, 1]


def test_a_swarm_names_the_blocks_without_a_server() -> None:
    assert (
        swarm_text("tiny-chat", 8, [SERVERS[0]]) == "tiny-chat · 8 blocks · 1 server · without a server: 4:8"
    )


def test_a_swarm_names_the_blocks_on_one_server_only() -> None:
    text = swarm_text("tiny-chat", 8, SERVERS)
    assert text == "tiny-chat · 8 blocks · 2 servers · on one server only: 0:2, 4:8"


def test_the_table_of_a_swarm_is_in_the_order_of_blocks() -> None:
    assert [row[0] for row in swarm_rows(SERVERS[::-1])] == ["server", "cedar", "maple"]


def test_servers_share_a_row_where_they_do_not_overlap() -> None:
    servers = [
        ServerPicture(name, name, *blocks)
        for name, blocks in zip("abc", [(0, 4), (4, 8), (2, 6)], strict=True)
    ]
    assert [[server.label for server in row] for row in lanes(servers)] == [["a", "b"], ["c"]]


def test_more_rows_than_fit_are_counted() -> None:
    servers = [ServerPicture(str(n), f"server-{n}", 0, 8) for n in range(MOST_LANES + 5)]
    assert "and 5 more servers" in texts(swarm_svg("tiny-chat", 8, servers))


def test_a_timeline_tells_the_step_in_the_middle() -> None:
    steps = [replace(STEP, number=n, total_ms=ms) for n, ms in enumerate((4.0, 9.0, 5.0), start=1)]
    assert timeline_text(steps) == "steps: the last 3, 5.0 ms in the middle"


def test_the_table_of_a_timeline_adds_up_the_hops() -> None:
    assert timeline_rows([replace(STEP, hops=[HOP, HOP])])[1][2:6] == ("5.0", "1.0", "6.0", "3.0")


def test_training_tells_loss_and_lost_work() -> None:
    text = training_text(TrainingPicture([2.0, 1.5], 100.0, {"cedar": 2}, lost=1))
    assert text == "2 steps · loss 1.5 · 100 tokens/s · 1 micro-batches done again after a lost server"


def test_a_bundle_has_every_form() -> None:
    forms = bundle("in words", swarm_svg("tiny-chat", 8, SERVERS), swarm_rows(SERVERS))
    assert set(forms) == {"text/plain", "image/svg+xml", "text/html"}
    ElementTree.fromstring(forms["image/svg+xml"])  # an image of its own, on a ground of its own


def test_a_new_server_goes_where_the_fewest_are() -> None:
    lost = ServerPicture("peer-d", "oak", 4, 8, "lost")
    assert least_covered(8, [ServerPicture("peer-a", "cedar", 0, 4), lost]) == (4, 8)


def test_where_all_blocks_are_alike_a_new_server_goes_to_the_first() -> None:
    assert least_covered(8, [SERVERS[1], SERVERS[0]]) == (0, 4)


def test_a_long_training_is_drawn_in_a_bounded_number_of_points() -> None:
    curve = LossCurve(most=100)
    sizes = set()
    for step in range(10_000):
        curve.add(float(step))
        sizes.add(len(curve.points()))
    assert max(sizes) <= 201
    assert (curve.count, curve.last) == (10_000, 9_999.0)


def test_the_points_of_a_long_training_are_means_of_its_steps() -> None:
    curve = LossCurve(most=2)
    for loss in (4.0, 2.0, 3.0, 1.0, 7.0):
        curve.add(loss)
    assert curve.points() == (3.0, 2.0, 7.0)
