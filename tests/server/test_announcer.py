"""A server's announcements, whatever its clock does."""

from __future__ import annotations

from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.server.announcer import Announcer
from swarmkit.server.config import ServerConfig

from .worlds import World

NOW = 1.8e9


class WrongClock:
    """A clock that is wrong by as much as the test says."""

    wrong_s = 0.0

    def now(self) -> float:
        return 0.0

    def time(self) -> float:
        return NOW + self.wrong_s


async def test_a_server_whose_clock_was_early_is_known_again_once_it_is_right(world: World) -> None:
    network, clock = MemoryNetwork(clock=lambda: NOW), WrongClock()
    transport = network.transport(record_check=lambda *record: is_acceptable(*record, NOW))
    registry = Registry(transport, clock.time)
    fingerprint = world.checkpoint.fingerprint
    announcer = Announcer(registry, ServerConfig(checkpoint=world.checkpoint), fingerprint, (0, 2), 0, clock)
    clock.wrong_s = 2 * 3600.0
    await announcer.announce(state="online")  # which peers refuse, as it is dated too far ahead
    clock.wrong_s = 0.0
    await announcer.announce(state="online")
    found = await registry.look_up(fingerprint, world.checkpoint.num_blocks)
    assert [server.peer_id for server in found.servers(NOW)] == [transport.peer_id]
