"""What programs that watch can read: health, numbers, and the state of the swarm."""

from __future__ import annotations

import re

import openai
import pytest

from swarmkit import LocalSwarm
from swarmkit.settings import ClientSettings
from tests.api.worlds import SUM, Api, api_of
from tests.waiting import wait_until


def numbers(api: Api) -> dict[str, float]:
    """The samples of `/metrics`."""
    with api.http() as http:
        text = http.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^([a-z_]\S*) (\S+)$", text, re.MULTILINE)}


def test_requests_tokens_and_steps_are_counted(api: Api, client: openai.OpenAI) -> None:
    before = numbers(api)
    found = client.chat.completions.create(model="tiny-chat", messages=SUM)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny-chat", messages=[])
    after = numbers(api)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert found.usage is not None
    path = "/v1/chat/completions"
    assert more(f'swarmkit_api_requests_total{{endpoint="{path}",status="200"}}') == 1
    assert more(f'swarmkit_api_requests_total{{endpoint="{path}",status="400"}}') == 1
    assert more("swarmkit_prompt_tokens_total") == found.usage.prompt_tokens
    assert more("swarmkit_generated_tokens_total") == found.usage.completion_tokens
    assert more("swarmkit_first_token_seconds_count") == 1
    assert more("swarmkit_step_seconds_count") >= found.usage.completion_tokens - 1
    assert more('swarmkit_hop_seconds_count{part="compute"}') == 2 * more("swarmkit_step_seconds_count")


def test_the_swarm_is_shown_with_what_would_break(api: Api) -> None:
    with api.http() as http:
        [model] = http.get("/swarm.json").json()["models"]
    assert (model["model"], model["runs"], model["replicas"]) == ("tiny-chat", True, [1] * 8)
    first, second = model["servers"]
    assert (first["name"], first["blocks"], second["blocks"]) == ("server-0", [0, 4], [4, 8])
    assert first["if_it_left"] == {"missing": [[0, 4]], "stops": True}
    assert first["uptime_s"] >= 0
    assert first["round_trip_s"] > 0


def test_a_lost_server_is_counted_and_blocks_without_a_server_are_unhealthy() -> None:
    attentive = ClientSettings().replace(refresh_period_s=0.2)
    with (
        LocalSwarm(
            "tiny-chat", num_stages=1, replicas=2, transport="memory", client_settings=attentive
        ) as swarm,
        api_of(swarm) as api,
        api.openai() as client,
        api.http() as http,
    ):
        stream = client.chat.completions.create(model="tiny-chat", messages=SUM, stream=True)  # type: ignore[call-overload]
        next(iter(stream))
        (used,) = [s for s in swarm.servers if s.serving.sessions.num_sessions]  # type: ignore[union-attr]
        used.kill()
        assert "7" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert numbers(api)['swarmkit_route_events_total{kind="peer_lost"}'] == 1
        assert numbers(api)["swarmkit_replayed_tokens_total"] > 0
        swarm.add_server((0, 4))
        for server in swarm.servers[:2]:
            server.stop(0.0)
        wait_until(lambda: http.get("/healthz").status_code == 503, "the server is unhealthy")
        assert http.get("/healthz").json() == {"status": "unavailable", "missing_blocks": [[4, 8]]}
