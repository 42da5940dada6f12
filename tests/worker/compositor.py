"""Wayland compositors for tests: one that tells what the test says, and KWin on a screen that nobody sees."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import wait_until

_HEAD = struct.Struct("=IHH")
SEAT, NOTIFIER = "wl_seat", "ext_idle_notifier_v1"


def event(object_: int, opcode: int, body: bytes = b"") -> bytes:
    return _HEAD.pack(object_, opcode, _HEAD.size + len(body)) + body


def text(words: str) -> bytes:
    content = words.encode() + b"\0"
    return struct.pack("=I", len(content)) + content + bytes(-len(content) % 4)


class SaidCompositor:
    """Has what it is given, and tells one client at a time whether somebody is there, as the test says.

    Attributes:
        asked: for each notification that a client has: its opcode, and after how many milliseconds.
    """

    def __init__(self, path: Path, interfaces: dict[str, int] | None = None) -> None:
        self.path = path
        self.asked: dict[int, tuple[int, int]] = {}
        self._has = {SEAT: 7, NOTIFIER: 1} if interfaces is None else interfaces
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def say(self, is_idle: bool) -> None:
        """Tell the client, which has asked before, of all seats."""
        wait_until(lambda: self.asked, "a client asks to be told")
        assert self._client is not None
        self._client.sendall(b"".join(event(told, 0 if is_idle else 1) for told in self.asked))

    def send(self, message: bytes) -> None:
        """Send the client some bytes."""
        assert self._client is not None
        self._client.sendall(message)

    def hang_up(self) -> None:
        """End the connection; the client may come again."""
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ended = True
        with suppress(OSError):
            self.hang_up()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last, suppress(OSError):
            last.connect(str(self.path))  # so that the thread waits for no other
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._ended:
            client, _ = self._listener.accept()
            with client, suppress(OSError, EOFError):
                self._client, self.asked = client, {}
                bound: dict[int, str] = {1: "wl_display"}
                while True:
                    self._answer(client, bound, *_received(client))

    def _answer(
        self, client: socket.socket, bound: dict[int, str], object_: int, opcode: int, body: bytes
    ) -> None:
        words = struct.unpack(f"={len(body) // 4}I", body)
        kind = bound[object_]
        new = words[-1] if kind == "wl_registry" else words[0]
        if new != len(bound) + 1:  # libwayland accepts no others
            client.sendall(event(1, 0, struct.pack("=II", object_, 1) + text("invalid arguments")))
        elif (kind, opcode) == ("wl_display", 1):  # get_registry
            bound[new] = "wl_registry"
            for number, (interface, version) in enumerate(self._has.items(), 10):
                about = struct.pack("=I", number) + text(interface) + struct.pack("=I", version)
                client.sendall(event(new, 0, about))
        elif (kind, opcode) == ("wl_display", 0):  # sync
            bound[new] = "wl_callback"
            client.sendall(event(new, 0, bytes(4)) + event(1, 1, struct.pack("=I", new)))
        elif kind == "wl_registry":  # bind
            interface = list(self._has)[words[0] - 10]
            assert text(interface) in body
            bound[new] = interface
            if interface == SEAT:
                client.sendall(event(new, 0, struct.pack("=I", 3)))  # it has pointer and keyboard
        else:
            assert (kind, bound[words[2]]) == (NOTIFIER, SEAT)
            bound[new] = "ext_idle_notification_v1"
            self.asked[new] = opcode, words[1]


def _received(client: socket.socket) -> tuple[int, int, bytes]:
    object_, opcode, size = _HEAD.unpack(_exactly(client, _HEAD.size))
    return object_, opcode, _exactly(client, size - _HEAD.size)


def _exactly(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = client.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return found


@contextmanager
def kwin(folder: Path) -> Iterator[str]:
    """KWin without a screen; the path of its socket.

    A copy of the program has not the right of the installed one to real-time priority, which containers
    refuse to grant.
    """
    program = folder / "kwin_wayland"
    shutil.copy(shutil.which("kwin_wayland") or "", program)
    run_time = folder / "run"
    run_time.mkdir(mode=0o700)
    server = subprocess.Popen(
        [program, "--virtual", "--no-lockscreen", "--socket", "wayland-test", "--width=320", "--height=200"],
        env={
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("DISPLAY", "WAYLAND_DISPLAY")
            },
            "XDG_RUNTIME_DIR": str(run_time),
            "XDG_CONFIG_HOME": str(folder),
            "LIBGL_ALWAYS_SOFTWARE": "1",
            "QT_QPA_PLATFORM": "wayland",
            "KWIN_WAYLAND_NO_PERMISSION_CHECKS": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = run_time / "wayland-test"
    try:
        wait_until(lambda: path.exists() or server.poll() is not None, "KWin has its socket", every=0.05)
        yield str(path)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


class FakeInput:
    """Moves KWin's pointer, by the protocol that KWin has for this (org_kde_kwin_fake_input)."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        self._socket.connect(path)
        self._socket.sendall(event(1, 1, struct.pack("=I", 2)) + event(1, 0, struct.pack("=I", 3)))
        number = 0
        while True:
            object_, opcode, body = _received(self._socket)
            if object_ == 3:
                break
            if (object_, opcode) == (2, 0) and text("org_kde_kwin_fake_input") in body:
                (number,) = struct.unpack_from("=I", body)
        assert number, "this KWin takes no input of programs"
        bind = struct.pack("=I", number) + text("org_kde_kwin_fake_input") + struct.pack("=II", 1, 4)
        self._socket.sendall(event(2, 0, bind) + event(4, 0, text("tests") + text("a person's hand")))

    def move(self) -> None:
        self._socket.sendall(event(4, 1, struct.pack("=ii", 5 << 8, 5 << 8)))

    def close(self) -> None:
        self._socket.close()
