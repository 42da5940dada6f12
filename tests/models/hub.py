"""The few routes of the Hugging Face Hub that loading a model needs, served from folders on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"


class LocalHub:
    """Attributes:
    url: what HF_ENDPOINT must be.
    fetched: names of the files whose content was sent, in order.
    """

    def __init__(self, repos: dict[str, Path | None]) -> None:
        """Serve `repos`; one that maps to None is gated."""
        self.repos = repos
        self.fetched: list[str] = []
        self.url = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        folder = self.repos[repo]
        if folder is None:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if api:
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            body = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": files,
                "private": False,
                "tags": [],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if parts[3] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        etag = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content


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
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body and status == 200:
                if "/resolve/" in self.path:
                    hub.fetched.append(self.path.split("/")[-1])
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
