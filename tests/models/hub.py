"""The few routes of the Hugging Face Hub that loading a model needs, served from folders on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c0ffee" * 6 + "c0de"
TOKEN = "hf_good"
_LARGE = (".safetensors", ".bin")


@dataclass
class Request:
    """What was asked for and how it was answered; `sent` counts bytes of content."""

    method: str
    name: str
    status: int
    span: tuple[int, int] | None
    sent: int = 0
    authorized: bool = False


class LocalHub:
    """A hub, and the ways in which it can misbehave.

    Attributes:
        url: what HF_ENDPOINT must be.
        requests: everything that was asked, in order.
        ranges: whether it understands Range.
        cdn: whether it redirects to a storage host with ETags of its own, as the Hub does.
        cut_after: end so many of the next large answers in the middle, each after this many bytes.
        spoil: flip a bit in so many of the next answers of more than `spoil_from` bytes of weights.
        wrong_range: answer so many of the next range requests with another range.
        busy: answer so many of the next requests for large content with 503.
    """

    def __init__(self, repos: dict[str, Path | None]) -> None:
        """Serve `repos`; one that maps to None is gated for everybody."""
        self.repos = repos
        self.gated: set[str] = set()
        self.requests: list[Request] = []
        self.url = ""
        self.ranges = True
        self.cdn = False
        self.cut_after: list[int] = []
        self.spoil = 0
        self.spoil_from = 10_000
        self.wrong_range = 0
        self.busy = 0

    @property
    def storage_url(self) -> str:
        """The same server under another name."""
        return self.url.replace("127.0.0.1", "localhost")

    @property
    def fetched(self) -> list[str]:
        """Names of the files of which content was sent, in order."""
        return [request.name for request in self.requests if request.method == "GET" and request.sent]

    def sent(self, suffix: str = "") -> int:
        """Bytes of content sent, of files whose name ends with `suffix`."""
        return sum(request.sent for request in self.requests if request.name.endswith(suffix))

    def answer(self, path: str, authorization: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and whole content."""
        parts = path.split("?")[0].strip("/").split("/")
        stored = parts[0] == "cdn"
        parts = parts[stored:]
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        folder = self.repos[repo]
        if folder is None or (repo in self.gated and not stored and authorization != f"Bearer {TOKEN}"):
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if api:
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            about = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": files,
                "private": False,
                "tags": [],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        if parts[3] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = file.read_bytes()
        large = file.suffix in _LARGE
        etag = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        if stored:
            return 200, {"ETag": '"of-the-storage"'}, content
        if self.cdn and large:
            # Another host, so that the client neither follows with its HEAD request nor sends its token.
            linked = {
                "X-Linked-ETag": f'"{etag}"',
                "X-Linked-Size": str(len(content)),
                "X-Repo-Commit": COMMIT,
            }
            return 302, {**linked, "Location": f"{self.storage_url}/cdn{path}"}, b""
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, content


def _wanted(hub: LocalHub, headers: dict[str, str], etag: str, size: int) -> tuple[int, int] | None:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
    if not hub.ranges or asked is None or headers.get("If-Range", etag) != etag:
        return None
    return int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)


@contextmanager
def local_hub(repos: dict[str, Path | None]) -> Iterator[LocalHub]:
    hub = LocalHub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def respond(self, with_body: bool) -> None:
            authorization = self.headers.get("Authorization", "")
            status, headers, body = hub.answer(self.path, authorization)
            name = self.path.split("?")[0].split("/")[-1]
            large = with_body and status == 200 and name.endswith(_LARGE)
            if large and hub.busy:
                hub.busy -= 1
                status, body = 503, b""
            asked = {key: self.headers[key] for key in ("Range", "If-Range") if key in self.headers}
            span = None
            if status == 200 and (span := _wanted(hub, asked, headers.get("ETag", ""), len(body))):
                status, start = 206, span[0]
                if start >= len(body):
                    status, body = 416, b""
                else:
                    whole, body = len(body), body[slice(*span)]
                    if hub.wrong_range:
                        hub.wrong_range -= 1
                        start += 1
                    headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{whole}"
            if large and hub.spoil and len(body) > hub.spoil_from:
                hub.spoil -= 1
                spoilt = bytearray(body)
                spoilt[len(body) // 2] ^= 1
                body = bytes(spoilt)
            request = Request(self.command, name, status, span, 0, authorization == f"Bearer {TOKEN}")
            hub.requests.append(request)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body and status in (200, 206):
                if large and hub.cut_after and len(body) > hub.cut_after[0]:
                    body = body[: hub.cut_after.pop(0)]
                    self.close_connection = True
                request.sent = len(body)
                with suppress(ConnectionError):  # the client has seen enough
                    self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client in this process speak to `hub`, as if HF_ENDPOINT and HF_HOME had been set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(home / "store"))


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HF_HUB_OFFLINE had been set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
