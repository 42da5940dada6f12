"""The view of a swarm: an immutable value, the same whatever the order in which its records arrived.

For every service of every peer the announcement that counts is the greatest by (sequence, bytes). `max` is
commutative, associative and idempotent, so merging is too; expiry is applied when the map is read, not when
it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from swarmkit.net.registry.records import Announcement, ServerState
from swarmkit.placement.ranges import uncovered


@dataclass(frozen=True)
class SwarmMap:
    """Which servers have which blocks, as far as this peer knows."""

    announcements: Mapping[str, Announcement] = field(default_factory=lambda: MappingProxyType({}))
    """The announcement that counts, by service id; expired ones included."""

    def apply(self, *news: Announcement) -> SwarmMap:
        """The map with announcements merged in; itself if nothing changes."""
        merged = dict(self.announcements)
        for announcement in news:
            current = merged.get(announcement.service_id)
            if current is None or _rank(announcement) > _rank(current):
                merged[announcement.service_id] = announcement
        if merged == self.announcements:
            return self
        return SwarmMap(MappingProxyType(merged))

    def without_expired(self, now: float) -> SwarmMap:
        """The map as it is at `now` (Unix time, seconds)."""
        alive = {name: record for name, record in self.announcements.items() if record.expires_at > now}
        return self if len(alive) == len(self.announcements) else SwarmMap(MappingProxyType(alive))

    def servers(self, now: float, states: Iterable[ServerState] = ("online",)) -> list[Announcement]:
        """Servers in one of `states` at `now`, in the order of their service ids."""
        wanted = frozenset(states)
        alive = (r for r in self.announcements.values() if r.expires_at > now and r.state in wanted)
        return sorted(alive, key=lambda record: record.service_id)

    def missing_blocks(self, num_blocks: int, now: float) -> list[tuple[int, int]]:
        """The ranges [start, stop) of a model of `num_blocks` that no online server holds."""
        return uncovered(0, num_blocks, ((r.start, r.stop) for r in self.servers(now)))


def _rank(announcement: Announcement) -> tuple[int, bytes]:
    return announcement.sequence, msgspec.msgpack.encode(announcement)
