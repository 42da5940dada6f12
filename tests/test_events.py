"""Events as values, and the stream that carries them to readers of any speed."""

from __future__ import annotations

import json
import threading

import anyio
import pytest

from swarmkit.events import (
    DrainStarted,
    Event,
    EventStream,
    HopTrace,
    Owner,
    PeerLost,
    ServerLeft,
    StepFinished,
    following,
)

OWNER = Owner("session", "12D3KooWabc", 7)
LIMIT_S = 20.0


def drained(sessions: int) -> DrainStarted:
    return DrainStarted(0, 4, sessions, time=5.0, owner=OWNER)


def step(position: int) -> StepFinished:
    hop = HopTrace("12D3KooWdef", "server-1", 0, 4, 0.5, 2.0, 1.0)
    return StepFinished(position, 1, 1, 3.5, (hop,), time=5.0, owner=OWNER)


# values


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        drained(1).sessions = 2  # type: ignore[misc]


def test_an_event_is_json_with_its_kind_time_owner_and_line_for_people() -> None:
    event = PeerLost("12D3KooWdef", "server-1", 0, 4, "connection lost", time=5.0, owner=OWNER)
    assert json.loads(json.dumps(event.to_json())) == {
        "event": "peer_lost",
        "time": 5.0,
        "owner": {"kind": "session", "peer_id": "12D3KooWabc", "number": 7},
        "peer_id": "12D3KooWdef",
        "label": "server-1",
        "start": 0,
        "stop": 4,
        "reason": "connection lost",
        "message": "lost server-1 [0:4]: connection lost",
    }


def test_the_json_of_a_step_has_the_times_of_every_hop() -> None:
    (hop,) = step(3).to_json()["hops"]
    assert (hop["label"], hop["queue_ms"], hop["compute_ms"], hop["network_ms"]) == (
        "server-1",
        0.5,
        2.0,
        1.0,
    )


# history


def test_the_history_holds_the_last_events() -> None:
    stream = EventStream(keep=2)
    for sessions in range(4):
        stream.emit(drained(sessions))
    assert stream.history == [drained(2), drained(3)]


def test_frequent_kinds_push_nothing_else_out_of_the_history() -> None:
    stream = EventStream(keep=2, apart={StepFinished: 3})
    stream.emit(drained(0))
    for position in range(9):
        stream.emit(step(position))
    assert stream.history == [drained(0)]
    assert list(stream.kept(StepFinished)) == [step(6), step(7), step(8)]


# subscriptions


def test_a_subscription_has_what_was_emitted_since() -> None:
    stream = EventStream()
    stream.emit(drained(0))
    subscription = stream.subscribe()
    stream.emit(drained(1))
    assert subscription.pending() == [drained(1)]


def test_a_subscription_to_some_kinds_has_no_others() -> None:
    stream = EventStream()
    subscription = stream.subscribe(8, ServerLeft)
    stream.emit(drained(1))
    stream.emit(ServerLeft(time=6.0, owner=OWNER))
    assert [type(event) for event in subscription.pending()] == [ServerLeft]


def test_a_reader_that_never_reads_loses_the_oldest_events_and_the_loss_is_counted() -> None:
    stream = EventStream()
    subscription = stream.subscribe(capacity=3)
    for sessions in range(10):
        stream.emit(drained(sessions))
    assert subscription.dropped == 7
    assert subscription.pending() == [drained(7), drained(8), drained(9)]


def test_events_that_were_read_are_not_counted_as_dropped() -> None:
    stream = EventStream()
    subscription = stream.subscribe(capacity=2)
    for sessions in range(10):
        stream.emit(drained(sessions))
        assert subscription.pending() == [drained(sessions)]
    assert subscription.dropped == 0


def test_emitting_calls_no_reader_and_formats_no_event() -> None:
    """What it does for a subscription whose reader is elsewhere is one append."""

    class Unreadable(ServerLeft, frozen=True):
        def __str__(self) -> str:
            raise AssertionError("formatted while emitting")

    stream = EventStream(apart={Unreadable: 1})
    subscription = stream.subscribe(capacity=1)
    event = Unreadable(time=6.0, owner=OWNER)
    stream.emit(event)
    assert subscription.pending() == [event]


def test_a_closed_subscription_gets_nothing_more_and_can_still_be_read() -> None:
    stream = EventStream()
    with stream.subscribe() as subscription:
        stream.emit(drained(1))
    stream.emit(drained(2))
    assert list(subscription) == [drained(1)]


def test_a_reader_that_waited_for_so_long_gets_nothing() -> None:
    assert EventStream().subscribe().get(timeout=0.01) is None


def test_a_reader_in_another_thread_gets_every_event_in_order() -> None:
    stream, read = EventStream(), list[Event]()
    subscription = stream.subscribe(capacity=10_000)
    reader = threading.Thread(target=lambda: read.extend(subscription))
    reader.start()
    for sessions in range(5_000):
        stream.emit(drained(sessions))
    stream.close()
    reader.join(LIMIT_S)
    assert read == [drained(sessions) for sessions in range(5_000)]


async def test_a_reader_on_the_loop_gets_what_another_thread_emits() -> None:
    stream = EventStream()
    subscription = stream.subscribe(capacity=10_000)

    def emit_all() -> None:
        for sessions in range(5_000):
            stream.emit(drained(sessions))
        stream.close()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, emit_all)
            read = [event async for event in subscription]
    assert read == [drained(sessions) for sessions in range(5_000)]


async def test_closing_ends_a_reader_that_waits_on_the_loop() -> None:
    subscription = EventStream().subscribe()
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, subscription.close)
            assert [event async for event in subscription] == []


def test_emitting_to_a_reader_whose_loop_has_ended_raises_nothing() -> None:
    stream = EventStream()
    subscription = stream.subscribe()

    async def read_in_vain() -> None:
        with anyio.move_on_after(0.01):
            await anext(subscription)

    anyio.run(read_in_vain)
    stream.emit(drained(1))
    assert subscription.pending() == [drained(1)]


def test_what_follows_a_stream_has_acted_on_everything_when_its_block_is_left() -> None:
    stream, acted = EventStream(), list[Event]()
    with following(stream, acted.append):
        for sessions in range(100):
            stream.emit(drained(sessions))
    assert acted == [drained(sessions) for sessions in range(100)]


def test_what_follows_a_stream_goes_on_after_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    stream, acted = EventStream(), list[Event]()

    def act(event: Event) -> None:
        acted.append(event)
        raise ValueError("not this time")

    with following(stream, act):
        stream.emit(drained(1))
        stream.emit(drained(2))
    assert acted == [drained(1), drained(2)]
    assert "not this time" in caplog.text
