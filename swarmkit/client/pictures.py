"""What a model, a session and the servers of a swarm look like: values for `swarmkit.drawing`."""

from __future__ import annotations

from collections.abc import Sequence

from swarmkit.drawing.bundle import bundle
from swarmkit.drawing.pipeline import pipeline_rows, pipeline_svg
from swarmkit.drawing.pipeline_log import hop_pictures
from swarmkit.drawing.swarm import swarm_rows, swarm_svg
from swarmkit.drawing.values import HopPicture, PipelinePicture, ServerPicture
from swarmkit.events import StepFinished
from swarmkit.net.registry.records import Announcement


def server_pictures(servers: Sequence[Announcement]) -> list[ServerPicture]:
    """Servers as they announce themselves."""
    return [
        ServerPicture(
            peer_id=server.peer_id,
            label=server.label,
            start=server.start,
            stop=server.stop,
            state=server.state,
            throughput=server.throughput,
            free_cache_tokens=server.free_cache_tokens,
            dtype=server.dtype,
        )
        for server in servers
    ]


def swarm_bundle(text: str, model: str, num_blocks: int, servers: Sequence[ServerPicture]) -> dict[str, str]:
    """A model's servers in every form that notebooks know.

    Args:
        text: the plain-text form.
    """
    return bundle(text, swarm_svg(model, num_blocks, servers), swarm_rows(servers))


def session_bundle(
    text: str,
    model: str,
    num_blocks: int,
    route: Sequence[HopPicture],
    servers: Sequence[ServerPicture],
    position: int,
) -> dict[str, str]:
    """A session's route in every form that notebooks know.

    Args:
        text: the plain-text form.
        position: tokens per row that the session holds.
    """
    picture = PipelinePicture(model, num_blocks, route, servers, position)
    return bundle(text, pipeline_svg(picture), pipeline_rows(picture))


def with_times(route: Sequence[HopPicture], last: StepFinished | None) -> list[HopPicture]:
    """The hops of a route with the times of a step that took the same way."""
    if last is None:
        return list(route)
    timed = {(hop.peer_id, hop.start, hop.stop): hop for hop in hop_pictures(last.hops)}
    return [timed.get((hop.peer_id, hop.start, hop.stop), hop) for hop in route]
