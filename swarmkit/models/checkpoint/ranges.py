"""Reading only the wanted bytes of a file on the Hub, by range requests.

A connection may be cut in the middle (the rest is requested from the byte where it stopped). The server may
know no ranges (the file is streamed through and only the wanted bytes are kept), answer another range than
requested, or hold another file than before (its ETag tells). The content of a range cannot be checked here,
as the Hub publishes hashes of whole files only. So a file that was read as a whole is compared with its hash,
and `store_fetch` does what can be done for parts.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.byte_ranges import ByteRange
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
"""`sink(offset, data)` takes wanted bytes of the file; overlapping calls only repeat earlier bytes."""

Pieces = Generator[tuple[int, memoryview, bool], None, None]
"""(offset, data, whether the whole file was read and has its hash)."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request that brings nothing is repeated, and how long to wait before.

    `attempts` counts requests in a row that brought nothing new.
    """

    attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, advised_s: float | None) -> None:
        """Wait after `failures` failures in a row; `advised_s` is what the server asks for."""
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
    """A file behind a URL of the Hub, in a fixed state.

    Not safe for use by several threads at once.

    Args:
        url: from `hf_hub_url`.
        label: its name in error messages.
        size, etag: from `get_hf_file_metadata`; the ETag is the SHA-256 for large files.
        headers: from `build_hf_headers`, with authorization.

    Attributes:
        received: bytes of content that were received, wanted or not.
        ranges: false once the server has shown that it ignores ranges.
    """

    def __init__(
        self,
        url: str,
        label: str,
        size: int,
        etag: str,
        headers: dict[str, str],
        retry: RetryPolicy | None = None,
    ) -> None:
        self.label = label
        self.size = size
        self.etag = etag
        self.received = 0
        self.ranges = True
        self._url = url
        # Compressed, a range would be one of other bytes.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._retry = retry or RetryPolicy()
        self._validator: str | None = None  # the ETag of the host that sends the bytes, perhaps not the Hub

    def header(self) -> Header:
        """Read the safetensors header, by two small ranges.

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
        """Read some bytes.

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
                if failures >= self._retry.attempts:
                    raise ModelError(
                        f"{self.label} could not be fetched from the Hub: {error}, after {failures} "
                        "attempts. What came is kept; check the connection and start again to go on from "
                        "there."
                    ) from error
                self._retry.wait(failures, error.advised_s)
            else:
                failures = 0
        return False

    def _attempt(self, span: ByteRange, todo: Sequence[ByteRange], to_the_end: bool) -> Pieces:
        """Make one request: pieces of `span`, or of all of `todo` where the server sends the whole file."""
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
        """Yield the content as it arrives; errors of the HTTP library mean that the connection was cut."""
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

    @contextmanager
    def _response(self, span: ByteRange) -> Iterator[Any]:
        """Stream a checked response; leaving the context closes the connection unless all was read."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        headers = dict(self._headers)
        if self.ranges:
            headers["Range"] = f"bytes={span.start}-{span.stop - 1}"
            if self._validator is not None:
                headers["If-Range"] = self._validator
        with ExitStack() as connection:
            try:
                # The session is the Hub client's own: its proxies and certificates, and on redirects no token
                # to other hosts.
                timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
                request = get_session().stream("GET", self._url, headers=headers, timeout=timeout)
                response = connection.enter_context(request)
            except (OfflineModeIsEnabled, HfHubHTTPError):
                raise
            except Exception as error:
                raise _TryAgainError(f"it could not be reached ({type(error).__name__}: {error})") from error
            self._check(response)
            yield response

    def _check(self, response: Any) -> None:
        """Check that a response is of the file that was requested and can be used.

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


def _etags(response: Any) -> list[str]:
    """Return the file's ETags as the Hub gives them; none where only a storage host answered, which has
    others.
    """
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
