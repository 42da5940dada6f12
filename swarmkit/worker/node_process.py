"""The node process: a `Node` with a server, which does what the worker tells it over its standard input.

`python -m swarmkit.worker.node_process` is started by a worker, and ends with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from swarmkit.errors import MemoryLimitError, SwarmkitError
from swarmkit.huge_pages import ask_for_huge_pages
from swarmkit.session_nice import set_session_nice
from swarmkit.sizes import format_bytes
from swarmkit.worker.node_messages import (
    FromNode,
    Leave,
    NodeEvent,
    NodeFailed,
    NodeOrder,
    NodeReport,
    Replace,
    Runtime,
    ToNode,
)

if TYPE_CHECKING:
    from swarmkit.node.server import Server
    from swarmkit.server.sessions.session import ServedTokens
    from swarmkit.settings import ServerSettings

_REPORT_PERIOD_S = 0.5
_NICE = 15
_CACHE_PART = 8
"""The keys and values of sessions take at most this part of the memory, which weights need too."""
_DAEMON_BYTES = 64 * 2**20
"""What the p2p daemon takes, beside the process itself."""
_ROUNDING_BYTES = 64 * 2**20
"""What the interpreter takes differs a little from run to run."""


class _Talk:
    """The standard output, on which any thread may say something."""

    def __init__(self) -> None:
        # Libraries print; what the worker reads must be ours alone.
        self._file = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def say(self, word: FromNode) -> None:
        """Tell the worker; when it has gone, nobody listens."""
        with self._lock, contextlib.suppress(OSError):
            self._file.write(msgspec.json.encode(word) + b"\n")


def be_a_guest() -> None:
    """Let every other program of the person come first: at the processor, the disk, and in want of memory."""
    process = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError):
        process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if sys.platform == "win32" else _NICE)
    if sys.platform == "linux":
        set_session_nice(_NICE)
        with contextlib.suppress(psutil.Error, OSError):
            process.ionice(psutil.IOPRIO_CLASS_IDLE)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Read an order from standard input and carry it out until told to leave."""
    be_a_guest()
    ask_for_huge_pages()
    talk = _Talk()
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=NodeOrder)
    leaving = _Leaving()
    commands = threading.Thread(target=_follow, args=(leaving,), name="swarmkit-commands", daemon=True)
    commands.start()
    try:
        _serve(order, talk, leaving)
    except Exception as error:  # noqa: BLE001 - it is told and written down, and the process ends
        if isinstance(error, SwarmkitError):
            talk.say(NodeFailed(why=_why(error, order)))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads standard input cannot be ended in any other way


def _why(error: SwarmkitError, order: NodeOrder) -> str:
    """Words for the person, who knows nothing of plans but has set a limit."""
    if not isinstance(error, MemoryLimitError) or order.serve.device != "cpu":
        return str(error)
    least = format_bytes(order.ram_bytes + error.missing_bytes + _ROUNDING_BYTES)
    return (
        f"{format_bytes(order.ram_bytes)} is too little memory to serve {order.serve.model}; allow at least "
        f"{least}"
    )


class _Leaving:
    """What the worker has said since, for the thread that serves."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.leave: Leave | None = None
        self.runtime = Runtime()


def _follow(told: _Leaving) -> None:
    """Take the worker's words as they come. When there is no worker any more, end at once."""
    for line in sys.stdin.buffer:
        word = msgspec.json.decode(line, type=ToNode)  # type: ignore[arg-type]
        with told.changed:
            if isinstance(word, Leave):
                told.leave = word
            elif isinstance(word, Replace):
                told.runtime = word.runtime
            told.changed.notify_all()
    os._exit(3)  # the p2p daemon sees the end of its owner, and ends too


def _serve(order: NodeOrder, talk: _Talk, told: _Leaving) -> None:
    os.environ["SWARMKIT_STORE_DIR"] = order.weights
    os.environ["SWARMKIT_STORE_MAX_BYTES"] = str(max(1, order.disk_bytes))
    from swarmkit.events import Event, following

    server = _server(order, told.runtime)

    def tell(event: Event) -> None:
        talk.say(NodeEvent(event=event.to_json()))

    with following(server.events, tell):
        starting = threading.Thread(target=_leave_when_told, args=(server, told), daemon=True)
        starting.start()
        try:
            server.start()
        except Exception:
            if told.leave is None:
                raise
            return
        _report_until_told(server, talk, told)
    talk.say(NodeEvent(event={"event": "node_left"}))
    os._exit(0)  # nothing is left to be put in order, and the memory is wanted back


def _server(order: NodeOrder, runtime: Runtime) -> Server:
    from transformers.utils import logging as transformers_logging

    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.net.connect import over_hivemind
    from swarmkit.node.server import Server

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    serve = order.serve
    memory, left = _memory(order)
    return Server(
        Checkpoint.open(serve.model),
        num_blocks=serve.num_blocks or "auto",
        memory_bytes=memory,
        device=serve.device,
        dtype=serve.dtype,
        public_name=serve.name,
        identity_path=order.identity,
        settings=_settings(left, runtime),
        transport=over_hivemind(
            serve.join,
            host=serve.host,
            port=serve.port,
            announce=serve.announce,
            use_relay=serve.relay,
            swarm_key=serve.swarm_key or None,
        ),
    )


def _memory(order: NodeOrder) -> tuple[int, int]:
    """Bytes to plan with: what the limits allow, but no more than the device has free. And how many of them
    are left beside what runs here already.
    """
    from swarmkit.models.device import ensure_device
    from swarmkit.models.plan import RUNTIME_BYTES, device_memory_bytes

    device = order.serve.device
    ensure_device(device)
    free = device_memory_bytes(device)
    if device == "cpu":
        # The interpreter and its libraries count as well. The plan has a part for them, though they are
        # loaded already.
        own = psutil.Process().memory_info().rss + _DAEMON_BYTES
        left = min(free, order.ram_bytes - own)
        return max(1, left + RUNTIME_BYTES["cpu"]), max(1, left)
    if not device.startswith("cuda"):
        least = min(free, order.ram_bytes)
        return least, least
    import torch

    index = torch.device(device).index or 0
    share = max(0.01, order.gpu_memory_share)
    torch.cuda.set_per_process_memory_fraction(share, index)
    _, total = torch.cuda.mem_get_info(index)
    least = min(free, int(total * share))
    return least, least


def _settings(memory: int, runtime: Runtime) -> ServerSettings:
    from swarmkit.settings import ServerSettings

    settings = ServerSettings()
    part = max(2**20, memory // _CACHE_PART)
    most = {
        name: max(1, min(getattr(group, name), part))
        for group, name in (
            (settings.limits, "cache_bytes"),
            (settings.limits, "activation_cache_bytes"),
            (settings.requests, "receive_budget_bytes"),
            (settings.adapters, "adapter_bytes"),
        )
    }
    return settings.replace(**most, **_changes(runtime))


def _changes(runtime: Runtime) -> dict[str, Any]:
    return msgspec.to_builtins(runtime)


def _leave_when_told(server: Server, told: _Leaving) -> None:
    """End the server when told to, also while it loads. Told again, it waits for its sessions no longer."""
    with told.changed:
        told.changed.wait_for(lambda: told.leave is not None)
        first = told.leave
    assert first is not None
    threading.Thread(target=server.stop, args=(first.drain_s,), daemon=True).start()
    with told.changed:
        told.changed.wait_for(lambda: told.leave is not first)
    server.skip_drain()


def _report_until_told(server: Server, talk: _Talk, told: _Leaving) -> None:
    """Say what the server does, and keep it within the limits, until it has left."""
    count = _Count(server)
    runtime = Runtime()
    while server.alive and told.leave is None:
        talk.say(count.report())
        with told.changed:
            told.changed.wait(_REPORT_PERIOD_S)
            latest = told.runtime
        if latest != runtime:
            server.set_limits(server.limits.replace(**_changes(latest)))
            runtime = latest
    while True:
        talk.say(count.report())
        try:
            server.wait(_REPORT_PERIOD_S)  # raises why it ended, if nobody asked it to
        except concurrent.futures.TimeoutError:
            continue
        return


class _Count:
    """Counts what a server does for its sessions."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._open: dict[str, ServedTokens] = {}
        self._begun = 0
        self._tokens_of_ended = 0

    def report(self) -> NodeReport:
        """All that was done until now. A session counts from its first step on."""
        found = {session.inlet: session.served for session in self._sessions() if session.served.count}
        self._begun += len(found.keys() - self._open.keys())
        # What a session did after the last look is in its counter, also when it has ended meanwhile.
        self._tokens_of_ended += sum(
            served.count for inlet, served in self._open.items() if inlet not in found
        )
        self._open = found
        traffic = self._server.traffic
        return NodeReport(
            sessions=len(found),
            sessions_begun=self._begun,
            tokens=self._tokens_of_ended + sum(served.count for served in found.values()),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            gpu_bytes=_gpu_bytes(),
        )

    def _sessions(self) -> list[Any]:
        return [session for serving in self._server.servings for session in serving.sessions.sessions]


def _gpu_bytes() -> int:
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0


if __name__ == "__main__":
    main()
