"""Who may use the control API: programs of the same person, and never a page in a browser. Pure.

A program of the person reads the token from a file that only the person can read, and sends it with each
request. A page in a browser can send requests to loopback as well, with or without a name of its own that
points there; browsers then send `Origin` or `Sec-Fetch-Site`, or a foreign `Host`, none of which a program of
ours sends.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable
from dataclasses import dataclass

MAX_BODY_BYTES = 64 * 1024
UNIX_HOST = "swarmkit-worker"
"""What `Host` says over the Unix socket."""


@dataclass(frozen=True)
class AccessRefusal:
    """The HTTP status and the sentence with which a request is refused."""

    status: int
    why: str


def refused(
    method: str,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    token: str,
    hosts: Collection[str],
) -> AccessRefusal | None:
    """Return why a request is refused; None if it is accepted.

    Args:
        headers: with names in lower case, as ASGI has them.
        token: what the request has to bring.
        hosts: what `Host` may say.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), []).append(value)
    host = found.get(b"host", [])
    if len(host) != 1 or host[0].decode("latin-1") not in hosts:
        return AccessRefusal(421, "the request is for another host")
    if b"origin" in found or b"sec-fetch-site" in found or b"sec-fetch-mode" in found:
        return AccessRefusal(403, "pages in a browser may not use this interface")
    given = found.get(b"authorization", [])
    if len(given) != 1 or not hmac.compare_digest(given[0], f"Bearer {token}".encode()):
        return AccessRefusal(
            401, "the token is missing or wrong; it stands in the worker's file control.json"
        )
    if method not in ("GET", "HEAD", "DELETE"):
        kind = found.get(b"content-type", [b""])
        if len(kind) != 1 or kind[0].split(b";")[0].strip().lower() != b"application/json":
            return AccessRefusal(415, "the body has to be application/json")
    length = found.get(b"content-length", [b"0"])
    if len(length) != 1 or not length[0].isdigit() or int(length[0]) > MAX_BODY_BYTES:
        return AccessRefusal(413, f"the body may have {MAX_BODY_BYTES} bytes")
    return None
