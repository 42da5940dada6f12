"""What does a direct connection cost, as it is, and what would it cost with TLS 1.3 of the standard library?

    python benchmarks/direct.py --json > benchmarks/results/direct.json     (about half a minute)

Both ends run in this process and on one event loop, over loopback, so that the work of both sides is in each
figure. Both kinds carry the same frames (`swarmkit/net/hivemind/framing.py`):

    sealed    as in `swarmkit/net/hivemind/direct.py`: a ticket, then AES-256-GCM with keys that came over the
              libp2p stream
    tls       TLS 1.3 of asyncio, with self-signed certificates at both ends, each of which is known to the
              other one beforehand, as it would be if it came over the libp2p stream; then a ticket

Reported, as medians over the repetitions, the two kinds by turns:

    connect_ms       until a connection is welcome
    echo_us_<size>   a frame of so many bytes there and back
    ratio_<figure>   tls / sealed
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from swarmkit.bench.environment import environment
from swarmkit.errors import SwarmkitError
from swarmkit.net.hivemind.direct import DirectListener, connect_directly
from swarmkit.net.hivemind.framing import FrameStream

_HOST = "127.0.0.1"
_SIZES = (64, 4096, 16 * 1024, 1024 * 1024)
_TICKET = b"t" * 32
_DAY = timedelta(days=1)

Connect = Callable[[], Awaitable[tuple[FrameStream, FrameStream]]]
"""Makes a connection; the opener's end, and the server's."""


class Sealed:
    """Direct connections as they are."""

    def __init__(self, owned: AsyncExitStack) -> None:
        self._streams: list[FrameStream] = []
        self._tasks: set[asyncio.Task[None]] = set()
        owned.callback(lambda: [stream.close() for stream in self._streams])

    async def start(self, owned: AsyncExitStack) -> Connect:
        """Listen; returns what makes connections."""
        listener = await DirectListener.open([_HOST], self._streams.append, self._spawn)
        assert listener is not None
        owned.callback(listener.close)

        async def connect() -> tuple[FrameStream, FrameStream]:
            with listener.offer("opener") as expected:
                opener, _ = await connect_directly(
                    "server", expected.offer, [_HOST], self._streams.append, 5.0
                )
                assert opener is not None
                return opener, expected.take()

        return connect

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class TlsStream(FrameStream):
    """A stream whose transport may hold bytes back: asyncio's TLS never goes on where it may hold none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=256 * 1024)


class Tls:
    """The same frames over TLS 1.3."""

    def __init__(self, owned: AsyncExitStack) -> None:
        self._accepted: asyncio.Queue[FrameStream] = asyncio.Queue()
        self._streams: list[FrameStream] = []
        owned.callback(lambda: [stream.close() for stream in self._streams])

    async def start(self, owned: AsyncExitStack) -> Connect:
        """Listen; returns what makes connections."""
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="swarmkit-bench-direct-")))
        server, client = (_certificate(folder / name) for name in ("server", "client"))
        loop = asyncio.get_running_loop()
        context = _context(ssl.PROTOCOL_TLS_SERVER, server, client)
        listening = await loop.create_server(
            lambda: TlsStream(on_connected=self._accept), _HOST, 0, ssl=context
        )
        owned.callback(listening.close)
        port = listening.sockets[0].getsockname()[1]
        own = _context(ssl.PROTOCOL_TLS_CLIENT, client, server)

        async def connect() -> tuple[FrameStream, FrameStream]:
            opener = TlsStream()
            await loop.create_connection(lambda: opener, _HOST, port, ssl=own)
            self._streams.append(opener)
            await opener.send(_TICKET)
            served = await self._accepted.get()
            assert await served.receive() == _TICKET
            await served.send(b"")
            assert await opener.receive() == b""
            return opener, served

        return connect

    def _accept(self, stream: FrameStream) -> None:
        self._streams.append(stream)
        self._accepted.put_nowait(stream)


def _certificate(folder: Path) -> Path:
    """A folder with a fresh key, and a certificate that it has signed itself."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a peer")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, plain))
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    return folder


def _context(kind: int, own: Path, other: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(own / "certificate.pem", own / "key.pem")
    context.load_verify_locations(other / "certificate.pem")
    return context


async def _echo(stream: FrameStream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except SwarmkitError:
        return


async def _connect_ms(connect: Connect) -> float:
    began = perf_counter()
    ends = await connect()
    spent = (perf_counter() - began) * 1e3
    for end in ends:
        end.close()
    return spent


async def _echoes_us(connect: Connect, size: int, number: int) -> float:
    opener, served = await connect()
    echo, message, times = asyncio.ensure_future(_echo(served)), bytes(size), []
    for _ in range(number):
        began = perf_counter()
        await opener.send(message)
        await opener.receive()
        times.append((perf_counter() - began) * 1e6)
    opener.close()
    await echo
    return statistics.median(times)


async def measure(rounds: int) -> list[dict[str, Any]]:
    """One row of figures for each kind, and one of their ratios."""
    async with AsyncExitStack() as owned:
        kinds = {"sealed": await Sealed(owned).start(owned), "tls": await Tls(owned).start(owned)}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in kinds}
        for turn in range(rounds + 1):
            for name, connect in kinds.items():
                figures = {"connect_ms": statistics.median([await _connect_ms(connect) for _ in range(20)])}
                for size in _SIZES:
                    number = 20 if size > 2**19 else 200
                    figures[f"echo_us_{size}"] = await _echoes_us(connect, size, number)
                for figure, value in figures.items() if turn else ():
                    found[name].setdefault(figure, []).append(value)
    medians = {
        name: {figure: statistics.median(values) for figure, values in of.items()}
        for name, of in found.items()
    }
    ratios = {
        f"ratio_{figure}": medians["tls"][figure] / value for figure, value in medians["sealed"].items()
    }
    rows: list[dict[str, Any]] = [{"kind": name, **_rounded(of)} for name, of in medians.items()]
    return [*rows, {"kind": "tls / sealed", **_rounded(ratios)}]


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    given = parser.parse_args()
    rows = asyncio.run(measure(given.rounds))
    if given.json:
        told = environment() | {"command": " ".join(["python benchmarks/direct.py", *sys.argv[1:]])}
        print(json.dumps(told | {"benchmark": "direct", "rows": rows}, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
