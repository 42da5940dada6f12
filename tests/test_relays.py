"""Servers that nobody can reach from outside serve all the same, through a peer that passes connections on.

The p2p daemon relays connections and finds out whether a peer can be reached; it punches no holes into NATs.
Real processes in network namespaces, where these can be had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.hivemind.addresses import dialable
from swarmkit.net.transport.identity import Identity
from swarmkit.settings import ClientSettings, ServerSettings

from .models.tiny import make_checkpoint
from .namespaces import Lan

pytestmark = pytest.mark.timeout(300)

PROMPT = (5, 9, 12, 7)
PATIENT = ClientSettings().replace(refresh_period_s=1.0, route_timeout_s=60.0)
LIVELY = ServerSettings().replace(announce_period_s=1.0, record_lifetime_s=5.0, throughput=100.0)
RELAY, HOME = (Identity(bytes([number]) * 32).peer_id for number in (1, 2))


def test_the_address_of_a_relayed_peer_is_written_as_the_daemon_reads_it() -> None:
    """The relay's id is its plain multihash: 38 bytes, which begin with the identity hash of 36."""
    (data,) = dialable(HOME, [f"/ip4/192.0.2.7/tcp/31337/p2p/{RELAY}/p2p-circuit/p2p/{HOME}"])
    assert data.hex().startswith("04c000020706" + "7a69" + "a50326" + "0024080112")
    assert data.hex().endswith("a202")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["through a NAT", "without a way"])
def test_a_server_that_nobody_reaches_serves_through_a_relay(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMKIT_NET_REACHABILITY", "public")  # of all but the one with --relay
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama"))
    local: Any = load_local(checkpoint)
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    expected = local.generate(
        ids, attention_mask=mask, do_sample=False, no_repeat_ngram_size=2, min_new_tokens=6, max_new_tokens=6
    )[0].tolist()
    with Lan(prefix="11.90.0") as lan:
        public, user = lan.machine(), lan.machine()
        first = public.serve(checkpoint.name, (0, 2), settings=LIVELY, listen="0.0.0.0")
        reachable = [address for address in first.addresses if public.address in address]
        if way == "through a NAT":
            router = lan.machine()
            router.translate()
            home, join = lan.machine_behind(router), reachable
        else:  # in a network that only the relay is in as well
            home = lan.machine_behind(public)
            join = [address.replace(public.address, "192.168.7.1") for address in reachable]
        home.serve(checkpoint.name, (2, 5), join, LIVELY, listen="0.0.0.0", relay=True)
        client = user.client(checkpoint.name, reachable, PATIENT)
        assert client.answer_at_last(6, prompt=PROMPT) == expected
