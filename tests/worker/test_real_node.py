"""A worker with a real node: sessions go on elsewhere, with the same tokens, when the person wants peace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import msgspec
import psutil
import pytest

from swarmkit import Server, SwarmModelForCausalLM
from swarmkit.worker.node_supervisor import NODE_COMMAND
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.signals import GpuSignals
from tests.waiting import wait_until
from tests.worker.elsewhere import AFTER, BEFORE, PROMPT, client_of, expected, more, slow_server
from tests.worker.worlds import AWAY, RunningWorker, SaidMachine

pytestmark = pytest.mark.slow

ONE_CORE = {"cpu_cores": {"in_use": 1, "away": 1}}


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    with slow_server() as server:
        yield server


@pytest.fixture
def serving(start: Callable[..., RunningWorker], other: Server) -> RunningWorker:
    worker = start(node_command=NODE_COMMAND)
    worker.serve({"model": "tiny-chat", "join": other.addresses}, limits=ONE_CORE)
    worker.wait_for("serving")
    return worker


@pytest.fixture
def model(serving: RunningWorker, other: Server) -> Iterator[SwarmModelForCausalLM]:
    with client_of(other) as model:
        yield model


Way = Callable[[RunningWorker, SaidMachine], object]


def sensed(**signals: object) -> Way:
    """What the worker senses of its machine, at its next look."""

    def sense(worker: RunningWorker, machine: SaidMachine) -> None:
        machine.say(**signals)
        worker.wait_for("stopping", "paused")

    return sense


def told(**signals: object) -> Way:
    """What a tray tells of the person's session, who was away until now."""

    def tell(worker: RunningWorker, machine: SaidMachine) -> None:
        worker.client.renew_lease("tray", AWAY)
        worker.client.change_settings({"rules": {"presence": "desktop"}})
        assert worker.status().state in ("serving", "working")
        worker.client.renew_lease("tray", msgspec.structs.replace(AWAY, **signals))

    return tell


WAYS: dict[str, Way] = {
    "a pause": lambda worker, machine: worker.client.pause(),
    "a polite pause": lambda worker, machine: worker.client.pause(haste="polite"),
    "a hard stop": lambda worker, machine: worker.client.pause(haste="now"),
    "the battery": sensed(on_battery=True),
    "a metered line": sensed(metered=True),
    "a game": sensed(program="doom"),
    "load of other programs": sensed(other_cpu=0.9),
    "another program on the GPU": sensed(gpu=GpuSignals(other_programs=("blender",))),
    "heat": sensed(temperature_c=95.0),
    "a full disk": sensed(disk_free_bytes=0),
    "no network": sensed(online=False),
    "the person comes back": told(idle_s=0.0),
    "a film": told(film="VLC media player"),
    "a program fills the screen": told(full_screen="doom"),
    "somebody comes in from afar": told(remote_session=True),
    "the end of the worker": lambda worker, machine: worker.client.stop(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_session_goes_on_elsewhere_with_the_same_tokens(
    serving: RunningWorker,
    machine: SaidMachine,
    model: SwarmModelForCausalLM,
    other: Server,
    way: Way,
) -> None:
    node = serving.status().node
    assert node is not None
    pids = used_by(node.pid).pids
    with model.session() as session:
        tokens = more(model, session, PROMPT, BEFORE)
        assert {hop.peer_id for hop in model.trace[-1].hops} == {node.peer_id}
        way(serving, machine)
        tokens = more(model, session, tokens, AFTER)
        used = {hop.peer_id for hop in model.trace[-1].hops}
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "it computes no more")
    assert (tokens[0].tolist(), used) == (expected(BEFORE + AFTER), {other.peer_id})


def test_what_was_contributed_is_counted_by_the_token(
    serving: RunningWorker, model: SwarmModelForCausalLM
) -> None:
    with model.session() as session:
        more(model, session, PROMPT, BEFORE)
        positions = session.position
        serving.wait_until(lambda status: status.today.tokens >= positions, "tokens are counted")
    today = serving.client.stats().today
    assert (today.sessions, today.tokens) == (1, positions)
    assert today.received_bytes > positions * model.config.hidden_size * 4


def test_all_processes_of_the_node_end_with_it(serving: RunningWorker, model: SwarmModelForCausalLM) -> None:
    node = serving.status().node
    assert node is not None
    pids = used_by(node.pid).pids
    assert len(pids) > 1  # its p2p daemon is one of them
    serving.client.pause()
    serving.wait_for("paused")
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "all processes have ended")


def test_too_little_memory_is_said_with_the_least_that_would_do(
    start: Callable[..., RunningWorker],
) -> None:
    worker = start(node_command=NODE_COMMAND)
    little = 512 * 2**20  # more than a node has when it begins to plan, and too little for one block
    worker.serve("tiny-chat", limits={**ONE_CORE, "ram_bytes": {"in_use": little, "away": little}})
    words = worker.wait_for("trouble").words
    found = re.search(r"512.0 MiB is too little memory to serve .*; allow at least ([\d.]+) MiB", words)
    assert found, words
    enough = int(float(found[1]) * 2**20)
    worker.client.change_settings({"limits": {"ram_bytes": {"in_use": enough, "away": enough}}})
    worker.wait_for("serving")


def test_a_node_goes_on_while_its_limits_are_replaced(
    serving: RunningWorker, model: SwarmModelForCausalLM
) -> None:
    node = serving.status().node
    assert node is not None
    with model.session() as session:
        tokens = more(model, session, PROMPT, BEFORE)
        limits = {"compute_share": {"in_use": 0.5, "away": 0.5}, "upload_bytes_per_s": {"away": 1e6}}
        serving.client.change_settings({"limits": limits})
        tokens = more(model, session, tokens, AFTER)
    after = serving.status().node
    assert after is not None
    assert (tokens[0].tolist(), after.pid) == (expected(BEFORE + AFTER), node.pid)
