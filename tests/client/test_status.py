"""The state of a swarm, as commands and user interfaces show it."""

from __future__ import annotations

import json

import torch

from swarmkit.client.overview import duration, status_rows, swarm_overview
from swarmkit.client.status import look_up_status, model_statuses
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.net.protocol.messages import ServerInfo
from swarmkit.net.rpc.server_info import InfoAnswer

from ..net.announcements import announcement

INFO = ServerInfo(
    start=0,
    stop=2,
    sessions=3,
    cache_tokens_free=10,
    cache_tokens_total=20,
    steps=5,
    leaving=False,
    waiting=2,
    expected_wait_ms=1500.0,
)


def test_blocks_that_only_a_joining_server_has_are_missing() -> None:
    servers = [
        announcement(0, num_blocks=6, start=0, stop=2, state="online"),
        announcement(1, num_blocks=6, start=2, stop=4, state="joining"),
    ]
    [model] = model_statuses(servers, {}, 0.0)
    assert model.missing == ((2, 6),)
    assert [server.blocks for server in model.servers] == [(0, 2), (2, 4)]


def test_models_are_told_apart_by_name_and_fingerprint() -> None:
    servers = [announcement(number, model=name) for number, name in enumerate("bab")]
    models = model_statuses(servers, {}, 0.0)
    assert [(model.model, len(model.servers)) for model in models] == [("a", 1), ("b", 2)]


def test_the_load_of_a_server_that_does_not_answer_is_not_known() -> None:
    silent, busy = announcement(0), announcement(1)
    [model] = model_statuses([silent, busy], {busy.service_id: InfoAnswer(INFO, 0.04)}, 0.0)
    load = {s.peer_id: (s.sessions, s.queue, s.expected_wait_s) for s in model.servers}
    assert load == {silent.peer_id: (None, None, None), busy.peer_id: (3, 2, 1.5)}


def test_the_free_cache_is_what_a_server_answers_or_else_announces() -> None:
    silent, busy = announcement(0, free_cache_tokens=7), announcement(1, free_cache_tokens=7)
    [model] = model_statuses([silent, busy], {busy.service_id: InfoAnswer(INFO, 0.04)}, 0.0)
    free = {s.peer_id: (s.free_cache_tokens, s.cache_tokens) for s in model.servers}
    assert free == {silent.peer_id: (7, None), busy.peer_id: (10, 20)}


def test_a_client_sees_the_servers_of_its_model_and_their_free_cache(tiny_llama: Checkpoint) -> None:
    with LocalSwarm(tiny_llama, 2, transport="memory") as swarm:
        model = swarm.model()
        free = [server.free_cache_tokens for server in model.servers]
        model.session(max_length=64)  # which holds nothing before its first step
        assert [server.blocks for server in model.servers] == [(0, 2), (2, 5)]
        assert min(free) > 0
        with model.session(max_length=64) as session, torch.no_grad():
            session.step(torch.zeros(1, 40, 32))
            busy = [server.free_cache_tokens for server in model.servers]
    assert all(now < before for now, before in zip(busy, free, strict=True))


def test_a_running_swarm_is_looked_up_with_the_load_of_each_server(tiny_llama: Checkpoint) -> None:
    with LocalSwarm(tiny_llama, 2, transport="memory") as swarm, portal.lease() as lease:
        assert swarm.network is not None
        [model] = lease.call(look_up_status, swarm.network.transport())
    assert (model.num_blocks, model.missing) == (5, ())
    assert [server.sessions for server in model.servers] == [0, 0]
    assert json.loads(json.dumps(model.to_json()))["servers"][0]["blocks"] == [0, 2]


def test_an_overview_says_which_blocks_would_be_missing_if_a_server_left() -> None:
    servers = [
        announcement(0, num_blocks=4, start=0, stop=2, state="online"),
        announcement(1, num_blocks=4, start=1, stop=4, state="online"),
        announcement(2, num_blocks=4, start=2, stop=4, state="online"),
        announcement(3, num_blocks=4, start=0, stop=4, state="leaving"),
    ]
    [model] = swarm_overview(model_statuses(servers, {}, 0.0))["models"]
    assert (model["runs"], model["replicas"]) == (True, [1, 2, 2, 2])
    left = {server["peer_id"]: server["if_it_left"] for server in model["servers"]}
    assert left[servers[0].peer_id] == {"missing": [[0, 1]], "stops": True}
    assert [left[each.peer_id]["stops"] for each in servers[1:]] == [False, False, False]


def test_a_model_that_does_not_run_is_stopped_by_none_that_leaves() -> None:
    only = announcement(0, num_blocks=4, start=0, stop=2)
    [model] = swarm_overview(model_statuses([only], {}, 0.0))["models"]
    assert (model["runs"], model["missing"], model["free_cache_tokens"]) == (False, [[2, 4]], 0)
    assert model["servers"][0]["if_it_left"] == {"missing": [[0, 4]], "stops": False}


def test_the_table_for_people_says_what_would_break_if_a_server_left() -> None:
    servers = [
        announcement(0, num_blocks=4, start=0, stop=2, state="online"),
        announcement(1, num_blocks=4, start=1, stop=4, state="online"),
        announcement(2, num_blocks=4, start=2, stop=4, state="online"),
    ]
    [model] = model_statuses(servers, {}, 0.0)
    _, *rows = status_rows(model)
    nothing = "nothing would break"
    assert [row[-1] for row in rows] == ["the model would stop: no other has 0:1", nothing, nothing]


def test_the_table_for_people_does_not_stop_a_model_that_does_not_run() -> None:
    only = announcement(0, num_blocks=4, start=0, stop=2)
    [model] = model_statuses([only], {}, 0.0)
    assert status_rows(model)[1][-1] == "0:2 would be missing, too"


def test_the_table_for_people_has_what_a_server_answers() -> None:
    silent, busy = announcement(0), announcement(1)
    [model] = model_statuses([silent, busy], {busy.service_id: InfoAnswer(INFO, 0.04)}, 0.0)
    head, *rows = status_rows(model)
    told = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    known, unknown = (told[f"…{each.peer_id[-6:]}"] for each in (busy, silent))
    assert (known["round trip"], known["wait"], known["sessions"]) == ("40.0 ms", "1.5 s", "3")
    assert (unknown["round trip"], unknown["wait"], unknown["sessions"]) == ("–", "–", "–")


def test_times_are_told_in_the_largest_unit_that_is_passed() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 7200, 200_000)] == ["0 s", "1 min", "2 h", "2 d"]


def test_an_overview_of_a_running_swarm_has_uptimes_and_round_trips(tiny_llama: Checkpoint) -> None:
    with LocalSwarm(tiny_llama, 2, transport="memory") as swarm, portal.lease() as lease:
        assert swarm.network is not None
        found = swarm_overview(lease.call(look_up_status, swarm.network.transport()))
    assert json.loads(json.dumps(found)) == found
    for server in found["models"][0]["servers"]:
        assert server["uptime_s"] >= 0.0
        assert server["round_trip_s"] > 0.0
        assert server["if_it_left"]["stops"]
