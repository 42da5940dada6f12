"""`swarmkit api` as a process: it answers, ends when it is told to, and refuses to be open by mistake."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarmkit.local.swarm import LocalSwarm

from .commands import TIMEOUT_S, run_here, start

pytestmark = pytest.mark.usefixtures("kept_fork_server")

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}


def test_the_api_answers_over_the_swarm_until_it_is_told_to_end(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# mine\nsesame\n")
    with LocalSwarm("tiny-chat", num_stages=1) as swarm:
        options = ("--join", swarm.initial_peers[0], "--name", "tiny", "--api-keys-file", str(keys))
        server = start("api", "tiny-chat", "--port", "0", *options, until="listening")
        with httpx.Client(base_url=server.event["url"], timeout=TIMEOUT_S) as http:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 401
            http.headers["x-api-key"] = "sesame"
            answer = http.post("/v1/chat/completions", json=CHAT).json()
            with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
                next(stream.iter_bytes())
                ended = server.end_with(signal.SIGTERM)
    assert "7" in answer["choices"][0]["message"]["content"]
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "everybody who reaches 0.0.0.0 could use the model"),
        (("--api-keys-file", "/no/such/file"), "the keys in /no/such/file cannot be read"),
    ],
)
def test_a_mistake_gets_one_clear_line(arguments: tuple[str, ...], said: str) -> None:
    result = run_here("api", "tiny-chat", *arguments)
    assert result.returncode == 1
    assert said in " ".join(result.stderr.split())
