"""Servers of checkpoints whose weights are stored quantised: what they announce, and what they need first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.errors import ModelError
from swarmkit.models.quantization import stored as quantised
from swarmkit.net import portal
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.node.server import Server
from tests.models.hub import LocalHub, local_hub, use_hub
from tests.models.quantise import to_fp8, to_gptq, with_bitsandbytes
from tests.models.tiny import make_checkpoint


class Place:
    """A network in this process."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()

    async def __call__(self, identity: Identity, check: RecordCheck) -> Transport:
        return self.network.transport(identity, check)

    def announced(self) -> list[str]:
        """The precisions of all servers."""

        async def look() -> list[str]:
            transport = await self(Identity(), acceptable_now)
            try:
                view = await Registry(transport).look_up_all()
                return [server.dtype for server in view.servers(0.0)]
            finally:
                await transport.close()

        with portal.lease() as lease:
            return lease.call(look)


def a_folder(home: Path) -> Path:
    return make_checkpoint(home, "llama", num_blocks=2, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_server_announces_how_its_weights_are_stored(tmp_path: Path, kind: str) -> None:
    folder, place = a_folder(tmp_path), Place()
    to_fp8(folder) if kind == "fp8" else with_bitsandbytes(folder, kind)
    with Server(folder, transport=place):
        assert place.announced() == [kind]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    folder = a_folder(tmp_path)
    to_gptq(folder)
    with local_hub({"some/gptq": folder}) as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


def test_what_a_machine_lacks_is_said_before_weights_are_fetched(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "is_installed", lambda package: package == "optimum")
    server = Server("some/gptq", transport=Place())
    with pytest.raises(ModelError, match=r"some/gptq are stored quantised \(gptq\).*pip install gptqmodel"):
        server.start()
    assert hub.sent(".safetensors") < 10_000  # its header
