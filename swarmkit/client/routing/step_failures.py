"""Which servers failed in one step, and is the step itself to blame? Pure: failures in, a verdict out."""

from __future__ import annotations

from collections.abc import Container, Sequence

from swarmkit.net.registry.records import Announcement
from swarmkit.placement.ranges import uncovered

_FAILED_PENALTY_S = 1e9
_REFUSED_PENALTY_S = 1e11


class StepFailures:
    """The servers that failed in one step. None of them is asked again while another has not failed.

    A server that refuses a step as malformed says that the client is at fault. That costs a server nothing,
    so it counts as the server's own failure, unless enough others say the same; see `is_step_to_blame`.
    """

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._refusers: list[str] = []

    @property
    def count(self) -> int:
        """How many servers failed."""
        return len(self._failures)

    @property
    def refusers(self) -> Sequence[str]:
        """Those that refused the step as malformed, by service id."""
        return self._refusers

    def note(self, service_id: str, refused: bool) -> None:
        """A server failed.

        Args: refused: it answered that the step is malformed.
        """
        self._failures[service_id] = self._failures.get(service_id, 0) + 1
        if refused and service_id not in self._refusers:
            self._refusers.append(service_id)

    def has_failed(self, service_id: str) -> bool:
        return service_id in self._failures

    def penalty_s(self, service_id: str) -> float:
        """For `routing.route_cost`, on top of the penalty of a ban."""
        if service_id not in self._failures:
            return 0.0
        each = _REFUSED_PENALTY_S if service_id in self._refusers else _FAILED_PENALTY_S
        return each * self._failures[service_id]

    def is_step_to_blame(
        self, start: int, stop: int, servers: Sequence[Announcement], worked: Container[str]
    ) -> bool:
        """Whether the step is believed to be malformed, after a refusal by a server of blocks [start, stop).

        Either every server of some block refused it, or two did, the latest of which has worked in this
        session.

        Args:
            servers: all that may be used.
            worked: the service ids of those that have worked in this session.
        """
        others = [server for server in servers if server.service_id not in self._refusers]
        if uncovered(start, stop, [(server.start, server.stop) for server in others]):
            return True
        return len(self._refusers) >= 2 and self._refusers[-1] in worked
