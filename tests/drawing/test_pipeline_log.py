"""What a picture remembers of events: the last route, lost servers for a while, and the speed."""

from __future__ import annotations

from swarmkit.drawing.pipeline_log import PipelineLog
from swarmkit.drawing.values import PipelinePicture, ServerPicture
from swarmkit.events import HopTrace, Owner, PeerLost, PeerReplaced, StepFinished

OWNER = Owner("session", "me", 1)


def step(
    time: float, position: int, peer: str = "a", *, tokens: int = 1, owner: Owner = OWNER
) -> StepFinished:
    hop = HopTrace(peer, f"server-{peer}", 0, 8, 0.1, 2.0, 1.0)
    return StepFinished(
        time=time, owner=owner, position=position, rows=1, tokens=tokens, total_ms=100.0, hops=(hop,)
    )


def lost(time: float, peer: str = "a") -> PeerLost:
    return PeerLost(
        time=time,
        owner=OWNER,
        peer_id=peer,
        label=f"server-{peer}",
        start=0,
        stop=8,
        reason="connection lost",
    )


def replaced(time: float, old: str = "a", new: str = "b") -> PeerReplaced:
    return PeerReplaced(
        time=time,
        owner=OWNER,
        peer_id=old,
        label=f"server-{old}",
        replaced_by=(new,),
        route=(f"server-{new} [0:8]",),
        replayed_tokens=5,
        stall_ms=30.0,
    )


def picture(log: PipelineLog, now: float) -> PipelinePicture:
    return log.picture(
        "tiny-chat", 8, [ServerPicture("a", "server-a", 0, 8), ServerPicture("b", "server-b", 0, 8)], now
    )


def after_a_takeover() -> PipelineLog:
    log = PipelineLog()
    for event in (step(10.0, 5), lost(10.1), replaced(10.2), step(10.3, 6, "b")):
        log.add(event)
    return log


def test_the_route_is_that_of_the_last_step() -> None:
    log = PipelineLog()
    log.add(step(1.0, 0, "a"))
    log.add(step(2.0, 1, "b"))
    assert [hop.label for hop in picture(log, 2.0).hops] == ["server-b"]


def test_a_lost_server_is_seen_before_its_replacement() -> None:
    assert [(hop.peer_id, hop.state) for hop in picture(after_a_takeover(), 10.4).hops] == [("a", "lost")]


def test_then_the_replacement_is_marked_as_new() -> None:
    assert [(hop.peer_id, hop.state) for hop in picture(after_a_takeover(), 12.0).hops] == [("b", "new")]


def test_after_a_while_the_replacement_is_like_any_other() -> None:
    assert [(hop.peer_id, hop.state) for hop in picture(after_a_takeover(), 40.0).hops] == [("b", "serving")]


def test_a_lost_server_is_listed_as_lost_for_a_while() -> None:
    states = {server.peer_id: server.state for server in picture(after_a_takeover(), 12.0).servers}
    assert states == {"a": "lost", "b": "online"}


def test_a_server_that_works_again_is_not_lost() -> None:
    log = after_a_takeover()
    log.add(step(10.5, 7, "a"))
    assert [(hop.peer_id, hop.state) for hop in picture(log, 10.5).hops] == [("a", "serving")]


def test_the_last_messages_are_told() -> None:
    assert picture(after_a_takeover(), 12.0).messages == [str(lost(10.1)), str(replaced(10.2))]


def test_the_speed_does_not_count_the_prompt() -> None:
    log = PipelineLog()
    log.add(step(1.0, 0, tokens=512))
    for number in range(10):
        log.add(step(1.1 + number / 10, 512 + number))
    speed = picture(log, 2.0).tokens_per_s
    assert speed is not None
    assert abs(speed - 10.0) < 1e-6


def test_there_is_no_speed_when_no_step_ran_lately() -> None:
    log = PipelineLog()
    log.add(step(1.0, 5))
    assert picture(log, 100.0).tokens_per_s is None


def test_a_step_of_another_session_begins_anew() -> None:
    log = PipelineLog()
    log.add(step(1.0, 5))
    log.add(step(2.0, 0, owner=Owner("session", "me", 2)))
    assert [(each.number, each.position) for each in log.steps()] == [(1, 0)]
