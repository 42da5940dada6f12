"""Which adapters do servers host, and which one is meant by a name? Pure: announcements in, a choice out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from swarmkit.errors import UsageError
from swarmkit.net.registry.records import Announcement
from swarmkit.placement.ranges import uncovered


def hosted_everywhere(servers: Sequence[Announcement], num_blocks: int) -> dict[str, str]:
    """By hash, what adapters are called that are hosted for every block; names are the first server's."""
    found = _by_hash(servers)
    return {name: label for name, (label, missing) in found.items() if not missing(num_blocks)}


def one_of(servers: Sequence[Announcement], num_blocks: int, name: str) -> tuple[str, str]:
    """The hash and the label of the adapter that is called `name`, or whose hash begins so.

    Raises:
        UsageError: there is none, or several; or it is not hosted for every block.
    """
    hosted = _by_hash(servers)
    called = {digest for digest, (label, _) in hosted.items() if label == name}
    meant = called or {digest for digest in hosted if len(name) >= 8 and digest.startswith(name)}
    if not meant:
        known = ", ".join(sorted({label for label, _ in hosted.values()})) or "none"
        raise UsageError(
            f"no server hosts an adapter called {name!r} for this model; hosted are: {known}. "
            "Start a server with `swarmkit serve MODEL --adapter FOLDER_OR_REPO`"
        )
    whole = {digest for digest in meant if not hosted[digest][1](num_blocks)}
    if len(whole) == 1:
        digest = whole.pop()
        return digest, hosted[digest][0]
    if whole:
        raise UsageError(
            f"several adapters are called {name!r}; give the beginning of a hash: "
            + ", ".join(digest[:12] for digest in sorted(whole))
        )
    digest = min(meant)
    blocks = ", ".join(f"{low}:{high}" for low, high in hosted[digest][1](num_blocks))
    raise UsageError(
        f"the adapter {name!r} is not hosted for blocks {blocks}; start a server for them with `--adapter`"
    )


class _Coverage:
    """The blocks for which an adapter is hosted."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, num_blocks: int) -> list[tuple[int, int]]:
        """What is missing."""
        return uncovered(0, num_blocks, self.ranges)


def _by_hash(servers: Sequence[Announcement]) -> dict[str, tuple[str, _Coverage]]:
    labels: dict[str, str] = {}
    coverage: defaultdict[str, _Coverage] = defaultdict(_Coverage)
    for server in sorted(servers, key=lambda server: server.peer_id):
        for adapter in server.adapters:
            labels.setdefault(adapter.name, adapter.label)
            coverage[adapter.name].ranges.append((server.start, server.stop))
    return {name: (label, coverage[name]) for name, label in labels.items()}
