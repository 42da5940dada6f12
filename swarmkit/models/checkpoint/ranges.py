"""Only the wanted bytes of a file on the Hub: range requests that survive cuts, and what they may not assume.

A connection may be cut in the middle (the rest is asked for from the byte where it stopped), the server may
know no ranges (the file is streamed through and only the wanted bytes are kept), answer another range than
was asked, or hold another file than before (its ETag tells). What a range contains cannot be checked here:
the Hub publishes hashes of whole files only. So a file that was read as a whole is compared with its hash,
and `store_fetch` does what can be done for parts.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.store_format import (
    LENGTH_BYTES,
    FormatError,
    Header,
    header_length,
    parse_header,
)

SHA256 = re.compile(r"[0-9a-f]{64}")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_PROGRESS_BYTES = 64 * 1024
_MAX_RETRY_AFTER_S = 60.0

Sink = Callable[[int, memoryview], None]
"""`sink(offset, data)`: takes wanted bytes of the file; overlapping calls only ever repeat earlier ones."""

Pieces = Generator[tuple[int, memoryview, bool], None, None]
"""(offset, data, whether the whole file has come and was verified)."""


class ByteRange(NamedTuple):
    """Bytes `[start, stop)` of a file."""

    start: int
    stop: int


def merge(spans: Iterable[ByteRange]) -> list[ByteRange]:
    """The same bytes as few spans, in order."""
    merged: list[ByteRange] = []
    for span in sorted(span for span in spans if span.start < span.stop):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return merged


def subtract(wanted: Iterable[ByteRange], had: Iterable[ByteRange]) -> list[ByteRange]:
    """The bytes of `wanted` that are not in `had`, in order."""
    rest: list[ByteRange] = []
    holes = merge(had)
    for span in merge(wanted):
        start = span.start
        for hole in holes:
            if hole.stop <= start or hole.start >= span.stop:
                continue
            if hole.start > start:
                rest.append(ByteRange(start, hole.start))
            start = hole.stop
        if start < span.stop:
            rest.append(ByteRange(start, span.stop))
    return rest


def coalesce(spans: Iterable[ByteRange], spare_bytes: int) -> list[ByteRange]:
    """Fewer, longer requests that hold all of `spans` and at most `spare_bytes` besides.

    The smallest gaps are bridged first: each costs its bytes and saves one request.
    """
    apart = merge(spans)
    gaps = sorted(range(1, len(apart)), key=lambda i: apart[i].start - apart[i - 1].stop)
    bridged = []
    for i in gaps:
        gap = ByteRange(apart[i - 1].stop, apart[i].start)
        spare_bytes -= gap.stop - gap.start
        if spare_bytes < 0:
            break
        bridged.append(gap)
    return merge([*apart, *bridged])


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request that gets nowhere is made again, and how long to wait before.

    `attempts` counts requests in a row that brought nothing new.
    """

    attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, advised_s: float | None) -> None:
        """Wait after so many failures in a row; `advised_s` is the server's own wish."""
        usual = min(self.first_wait_s * 2 ** (failures - 1), self.longest_wait_s)
        self.sleep(max(usual, min(advised_s or 0.0, _MAX_RETRY_AFTER_S)))


class _TryAgainError(Exception):
    """A request failed in a way that another one may not."""

    def __init__(self, why: str, advised_s: float | None = None) -> None:
        super().__init__(why)
        self.advised_s = advised_s


class _CorruptError(_TryAgainError):
    """All bytes of the file came, and they are not the file's."""


class RemoteFile:
    """A file behind a URL of the Hub, at a fixed state of it.

    Not safe for use by several threads at once.

    Args:
        url: from `hf_hub_url`.
        label: what error messages call it.
        size, etag: from `get_hf_file_metadata`; the ETag is the SHA-256 for large files.
        headers: from `build_hf_headers`, with authorization.

    Attributes:
        received: bytes of content that came over the wire, wanted or not.
        ranges: false once the server has shown that it ignores ranges.
    """

    def __init__(
        self,
        url: str,
        label: str,
        size: int,
        etag: str,
        headers: dict[str, str],
        patience: RetryPolicy | None = None,
    ) -> None:
        self.label = label
        self.size = size
        self.etag = etag
        self.received = 0
        self.ranges = True
        self._url = url
        # Compressed, a range would be one of other bytes.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._patience = patience or RetryPolicy()
        self._validator: str | None = None  # the ETag of whoever sends the bytes, which may not be the Hub

    def header(self) -> Header:
        """The safetensors header, by two small ranges.

        Raises:
            ModelError: it cannot be fetched, or is no safetensors header, even when asked for once more.
        """
        try:
            return self._read_header()
        except FormatError:
            try:
                return self._read_header()
            except FormatError as error:
                raise ModelError(
                    f"{self.label} is not a safetensors file: {error}. Tell the repository's owner, or use "
                    "another revision."
                ) from error

    def _read_header(self) -> Header:
        first = self.read(ByteRange(0, min(LENGTH_BYTES, self.size)))
        length = header_length(first, self.size)
        return parse_header(first + self.read(ByteRange(LENGTH_BYTES, LENGTH_BYTES + length)), self.size)

    def read(self, span: ByteRange) -> bytes:
        """These bytes.

        Raises:
            ModelError: see `stream`.
        """
        content = bytearray(span.stop - span.start)

        def keep(offset: int, data: memoryview) -> None:
            content[offset - span.start : offset - span.start + len(data)] = data

        if content:
            self.stream([span], keep, to_the_end=False)
        return bytes(content)

    def stream(self, requests: Sequence[ByteRange], sink: Sink, *, to_the_end: bool = True) -> bool:
        """Hand the bytes of `requests` (sorted, apart) to `sink`, in order.

        Args:
            to_the_end: where the server sends whole files only, read on after the last wanted byte, so that
                the file's hash can be checked.

        Returns: whether the whole file was read and found to have the hash that the Hub publishes.

        Raises:
            ModelError: the file changed, or the bytes did not come within the attempts that `RetryPolicy`
                allows.
            HfHubHTTPError: the Hub refused (no such file, no access).
        """
        failures, reached = 0, 0  # everything wanted before `reached` is with the sink
        while todo := [ByteRange(max(s.start, reached), s.stop) for s in requests if s.stop > reached]:
            began = reached
            try:
                with closing(self._attempt(todo[0], todo, to_the_end)) as pieces:
                    for offset, data, verified in pieces:
                        if verified:
                            return True
                        sink(offset, data)
                        reached = offset + len(data)
            except _TryAgainError as error:
                corrupt = isinstance(error, _CorruptError)
                failures = 1 if reached - began >= _PROGRESS_BYTES and not corrupt else failures + 1
                if corrupt:
                    reached = 0
                if failures >= self._patience.attempts:
                    raise ModelError(
                        f"{self.label} could not be fetched from the Hub: {error}, after {failures} "
                        "attempts. What came is kept; check the connection and start again to go on from "
                        "there."
                    ) from error
                self._patience.wait(failures, error.advised_s)
            else:
                failures = 0
        return False

    def _attempt(self, span: ByteRange, todo: Sequence[ByteRange], to_the_end: bool) -> Pieces:
        """One request: pieces of `span`, or of all of `todo` where the server sends the whole file."""
        with self._response(span) as response:
            if response.status_code == 206:
                yield from self._of_range(response, span)
                return
            if self._validator is None:
                self.ranges = False
                yield from self._of_whole(response, todo, to_the_end)
                return
        # Perhaps only If-Range was not understood, as with several caches behind one name.
        self._validator = None
        yield from self._attempt(span, todo, to_the_end)

    def _of_range(self, response: Any, span: ByteRange) -> Pieces:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != span.start or int(found[2]) + 1 != span.stop:
            told = response.headers.get("Content-Range")
            raise _TryAgainError(f"asked for bytes {span.start}-{span.stop - 1}, it answered {told!r}")
        if found[3] != "*" and int(found[3]) != self.size:
            raise self._changed(f"it has {found[3]} bytes instead of {self.size}")
        etag = response.headers.get("ETag", "")
        self._validator = etag if etag.startswith('"') else None
        offset = span.start
        for data in self._body(response):
            if offset + len(data) > span.stop:
                raise _TryAgainError("it sent more than was asked for")
            yield offset, data, False
            offset += len(data)
        if offset < span.stop:
            raise _TryAgainError(f"the connection was cut at byte {offset}")

    def _of_whole(self, response: Any, todo: Sequence[ByteRange], to_the_end: bool) -> Pieces:
        verifiable = to_the_end and SHA256.fullmatch(self.etag) is not None
        digest = hashlib.sha256()
        offset = 0
        for data in self._body(response):
            digest.update(data)
            for span in todo:
                low, high = max(span.start, offset), min(span.stop, offset + len(data))
                if low < high:
                    yield low, data[low - offset : high - offset], False
            offset += len(data)
            if not verifiable and offset >= todo[-1].stop:
                return
        if offset < self.size:
            raise _TryAgainError(f"the connection was cut at byte {offset}")
        if offset > self.size:
            raise self._changed(f"it has {offset} bytes instead of {self.size}")
        if verifiable:
            if digest.hexdigest() != self.etag:
                raise _CorruptError("its bytes do not have the hash that the Hub publishes")
            yield offset, memoryview(b""), True

    def _body(self, response: Any) -> Iterator[memoryview]:
        """The content as it comes; whatever the HTTP library raises means that the connection was cut."""
        pieces = response.iter_raw()  # in a chunk of a fixed size, what came before a cut would be lost
        while True:
            try:
                data = next(pieces, None)
            except Exception as error:  # these errors differ by library and version
                raise _TryAgainError(f"the connection was cut ({type(error).__name__})") from error
            if data is None:
                return
            self.received += len(data)
            yield memoryview(data)

    def _response(self, span: ByteRange) -> _Opened:
        headers = dict(self._headers)
        if self.ranges:
            headers["Range"] = f"bytes={span.start}-{span.stop - 1}"
            if self._validator is not None:
                headers["If-Range"] = self._validator
        return _Opened(self, self._url, headers)

    def check(self, response: Any) -> None:
        """Whether a response is of the file that was asked for and can be used.

        Raises:
            ModelError: the file changed.
            HfHubHTTPError: the Hub refused.
            _TryAgainError: it may answer later.
        """
        from huggingface_hub.utils import hf_raise_for_status

        status = response.status_code
        if status in _TRY_AGAIN:
            raise _TryAgainError(f"the Hub answered {status}", _retry_after(response))
        if status == 416:
            raise self._changed(f"it has fewer than the {self.size} bytes it had")
        hf_raise_for_status(response)
        if status not in (200, 206):
            raise _TryAgainError(f"the Hub answered {status}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _TryAgainError("it came compressed, against our wish")
        etags = _etags(response)
        if etags and self.etag and self.etag not in etags:
            raise self._changed(f"its ETag is {etags[0][:16]}… instead of {self.etag[:16]}…")

    def _changed(self, how: str) -> ModelError:
        return ModelError(
            f"{self.label} has changed on the Hub while it was being read: {how}. Open the model again; "
            "if that does not help, give a revision (a commit)."
        )


class _Opened:
    """A streamed response that has been looked at, in a `with` block."""

    def __init__(self, file: RemoteFile, url: str, headers: dict[str, str]) -> None:
        self._file = file
        self._url = url
        self._headers = headers
        self._context: Any = None

    def __enter__(self) -> Any:
        from huggingface_hub import constants, get_session
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        # The session is the Hub client's own: its proxies and certificates, and no token to strangers on
        # redirects.
        self._context = get_session().stream(
            "GET", self._url, headers=self._headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        try:
            response = self._context.__enter__()
        except (OfflineModeIsEnabled, HfHubHTTPError):
            raise
        except Exception as error:
            raise _TryAgainError(f"it could not be reached ({type(error).__name__}: {error})") from error
        try:
            self._file.check(response)
        except BaseException:
            self._context.__exit__(None, None, None)
            raise
        return response

    def __exit__(self, *exception: object) -> None:
        # Closes the connection if the body was not read to its end.
        self._context.__exit__(None, None, None)


def _etags(response: Any) -> list[str]:
    """The file's ETag as the Hub gives it; empty where only a storage host, with its own names, spoke."""
    steps = (*response.history, response)
    linked = [_bare(step.headers["X-Linked-ETag"]) for step in steps if "X-Linked-ETag" in step.headers]
    if response.history and not linked:
        return []
    return linked + [_bare(step.headers["ETag"]) for step in steps if "ETag" in step.headers]


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _retry_after(response: Any) -> float | None:
    try:
        return float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
