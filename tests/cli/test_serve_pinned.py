"""`swarmkit serve --fingerprint`: two machines' worth of processes, and a hub that counts."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.net import portal
from swarmkit.net.connect import over_hivemind
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.transport.identity import Identity
from swarmkit.server.weights.transfer import look_up
from tests.models.hub import LocalHub, local_hub
from tests.models.tiny import make_checkpoint

from ..waiting import eventually
from .commands import Running, run, start


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub that processes started from here take for the real one."""
    with local_hub({"some/llama": make_checkpoint(tmp_path, "llama", num_blocks=2)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def on_a_machine_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME", "SWARMKIT_STORE_DIR"):
        monkeypatch.setenv(name, str(home / name))


async def until_offered(server: Running) -> None:
    """A server offers what it has soon after it has begun to serve."""
    fingerprint = server.event["fingerprint"]
    transport = await over_hivemind([server.address], client_mode=True)(Identity(), acceptable_now)

    async def offered() -> bool:
        return len(await look_up(transport, fingerprint, [None, 0, 1], time.time())) == 3

    try:
        await eventually(offered, "the server offers its manifest and two blocks")
    finally:
        await transport.close()


@pytest.fixture
def first(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server that has its blocks from the Hub, and offers them."""
    on_a_machine_of_its_own(tmp_path / "first", monkeypatch)
    running = start("serve", "some/llama", "--threads", "1", until="serving_started")
    with portal.lease() as lease:
        lease.call(until_offered, running)
    yield running
    assert running.end_with(signal.SIGTERM).returncode == 0


@pytest.mark.slow
def test_a_second_server_with_the_fingerprint_asks_the_hub_for_nothing(
    hub: LocalHub, first: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(run("fingerprint", "some/llama", "--json").stdout)
    assert told["without_blocks"] == first.event["fingerprint"]
    hub.repos.clear()  # whatever is asked from now on is refused, and counted
    on_a_machine_of_its_own(tmp_path / "second", monkeypatch)
    asked = len(hub.requests)
    pinned = ("--fingerprint", told["fingerprint"], "--weights-from", "peers")

    second = start(
        "serve", "some/llama", "--join", first.address, "--threads", "1", *pinned, until="serving_started"
    )

    assert (second.event["start"], second.event["stop"]) == (0, 2)
    assert len(hub.requests) == asked
    assert second.end_with(signal.SIGTERM).returncode == 0


@pytest.mark.slow
def test_a_model_that_is_another_one_is_not_served() -> None:
    result = run("serve", "tiny-chat", "--fingerprint", "0" * 32)
    assert result.returncode != 0
    assert "has the fingerprint" in result.stderr
