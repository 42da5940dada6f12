"""What a second server costs the Hub, when the first can give it the manifest and its blocks.

A checkpoint lies behind local stand-ins for the Hub, one for each server, that count what they are asked and
what they send. Two servers start one after the other, each a process of its own with caches of its own, as on
two machines. The second joins the first and was given the model's fingerprint, so that it need not ask the
Hub what the model is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from swarmkit.bench.options import Weights
from swarmkit.bench.progress import Progress, quiet
from swarmkit.errors import SwarmkitError

_REPO = "bench/model"
_COMMIT = "b" * 40
_WEIGHTS = ".safetensors"


class _Hub:
    """Counts the bytes of content that it sends: of weights, and of everything else."""

    def __init__(self, folder: Path) -> None:
        self.sent = {"weights": 0, "other": 0}
        self.requests = 0
        self._folder = folder
        self._etags: dict[str, str] = {}

    def etag(self, file: Path) -> str:
        """A hash as the Hub gives it: the SHA-256 for weights, a git-like one for the rest."""
        if file.name not in self._etags:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256" if file.suffix == _WEIGHTS else "sha1")
            self._etags[file.name] = f'"{digest.hexdigest()}"'
        return self._etags[file.name]

    def find(self, path: str) -> Path | None:
        """The file behind a URL's path."""
        prefix, _, name = path.split("?")[0].rpartition("/")
        file = self._folder / name
        known = prefix in (f"/{_REPO}/resolve/main", f"/{_REPO}/resolve/{_COMMIT}")
        return file if known and re.fullmatch(r"[\w.-]+", name) and file.is_file() else None


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, _Hub]]:
    hub = _Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            hub.requests += 1
            file = hub.find(self.path)
            if file is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", _COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("ETag", hub.etag(file))
            self.send_header("X-Repo-Commit", _COMMIT)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if with_body:
                hub.sent["weights" if file.suffix == _WEIGHTS else "other"] += stop - start
                with file.open("rb") as content:
                    content.seek(start)
                    while start < stop:
                        chunk = content.read(min(1024 * 1024, stop - start))
                        self.wfile.write(chunk)
                        start += len(chunk)

        def log_message(self, *args: object) -> None:
            """Nothing: requests are counted, not told."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="swarmkit-bench-hub")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def measure(options: Weights, on_progress: Progress = quiet) -> dict[str, Any]:
    """Start two servers of the same blocks of a random Llama; what each had from the Hub and from its peer.

    `hub_bytes_*` are weights, `hub_other_bytes_*` config and index; `hub_requests_*` counts also questions
    that are answered without content.
    """
    from swarmkit.bench.random_llama import make_random_llama

    with tempfile.TemporaryDirectory(prefix="swarmkit-bench-weights-") as scratch:
        home = Path(scratch)
        on_progress("writing a random Llama", 0, 3)
        folder = make_random_llama(
            home / "model",
            hidden_size=options.hidden_size,
            num_blocks=options.blocks,
            num_heads=8,
            num_kv_heads=4,
            intermediate_size=options.hidden_size * 11 // 4,
            vocab_size=4096,
        )
        with _serving(folder) as (first_url, first_hub), _serving(folder) as (second_url, second_hub):
            common = {"stop": options.blocks, "threads": options.threads}
            on_progress("the first server fetches from the hub", 1, 3)
            with _server(home / "first", first_url, {**common, "source": "hub", "peers": []}) as first:
                on_progress("the second server fetches from the first", 2, 3)
                own = {**common, "source": "peers", "peers": first["addresses"]}
                own["fingerprint"] = first["full_fingerprint"]
                with _server(home / "second", second_url, own) as second:
                    pass
        on_progress("done", 3, 3)
    return {
        **options.values("blocks"),
        "block_bytes": first["block_bytes"],
        "hub_bytes_first": first_hub.sent["weights"],
        "hub_bytes_second": second_hub.sent["weights"],
        "peer_bytes_second": second["peer_bytes"],
        "hub_other_bytes_first": first_hub.sent["other"],
        "hub_other_bytes_second": second_hub.sent["other"],
        "hub_requests_first": first_hub.requests,
        "hub_requests_second": second_hub.requests,
        "open_seconds_first": first["open_s"],
        "open_seconds_second": second["open_s"],
        "fetch_seconds_first": first["fetch_s"],
        "fetch_seconds_second": second["fetch_s"],
        "load_seconds_first": first["load_s"],
        "load_seconds_second": second["load_s"],
        "same_fingerprint": first["fingerprint"] == second["fingerprint"],
        **options.values("threads"),
    }


@contextmanager
def _server(home: Path, hub_url: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A process that fetches, loads and offers, until the block ends; what it reports."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SWARMKIT_"))}
    own = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "SWARMKIT_STORE_DIR": str(home / "store")}
    own |= {"XDG_CACHE_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "swarmkit.bench.weights", json.dumps(options)],
        env=clean | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SwarmkitError("a server of this benchmark did not start; what it said is above")
        yield json.loads(line)
    finally:
        process.stdin.close()  # which ends it
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def _serve(options: dict[str, Any]) -> None:
    """The child's life: everything that a server does with its weights, over a real transport."""
    import anyio
    import anyio.to_thread
    import torch

    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.models.execution.stage import Stage
    from swarmkit.net.connect import over_hivemind
    from swarmkit.net.registry.acceptance import acceptable_now
    from swarmkit.net.transport.identity import Identity
    from swarmkit.server.weights.manifest import open_with_fingerprint
    from swarmkit.server.weights.service import WeightsSettings
    from swarmkit.server.weights.share import SharedWeights

    torch.set_num_threads(options["threads"])
    settings = WeightsSettings(source=options["source"], upload_bytes_per_s=1e12)
    before = time.perf_counter()
    if "fingerprint" in options:
        lookup = over_hivemind(options["peers"], client_mode=True)
        checkpoint = await anyio.to_thread.run_sync(
            lambda: open_with_fingerprint(_REPO, options["fingerprint"], lookup, settings)
        )
    else:
        checkpoint = Checkpoint.open(_REPO, progress=False)
    opened = time.perf_counter()
    transport = await over_hivemind(options["peers"])(Identity(), acceptable_now)
    try:
        weights = SharedWeights(transport, checkpoint, settings)
        began = time.perf_counter()
        report = await weights.fetch(0, options["stop"])
        fetched = time.perf_counter()
        await anyio.to_thread.run_sync(lambda: Stage.load(checkpoint, 0, options["stop"]))
        loaded = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(weights.run, 0, options["stop"])
            await weights.offer(0, options["stop"])
            full = await anyio.to_thread.run_sync(checkpoint.make_full_manifest)  # all of it is here
            blobs = [
                part.stat().st_size for part in (Path(os.environ["SWARMKIT_STORE_DIR"]) / "blobs").iterdir()
            ]
            result = {
                "addresses": list(transport.addresses),
                "fingerprint": checkpoint.fingerprint,
                "full_fingerprint": full.full_fingerprint,
                "block_bytes": sum(blobs),
                "peer_bytes": report.peer_bytes,
                "open_s": round(opened - before, 3),
                "fetch_s": round(fetched - began, 3),
                "load_s": round(loaded - fetched, 3),
            }
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
            await anyio.to_thread.run_sync(sys.stdin.read)
            tasks.cancel_scope.cancel()
    finally:
        await transport.close()


if __name__ == "__main__":
    import asyncio

    asyncio.run(_serve(json.loads(sys.argv[1])))
