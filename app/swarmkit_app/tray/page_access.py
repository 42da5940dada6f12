"""Who may use the tray's pages: this person's browser, which has opened a link that the tray made. Pure.

A link carries a key that works once, within a minute. It is exchanged for a cookie that no other site's page
can send along (`SameSite=Strict`) and no script can read. Requests that change something must also come from
a page of ours, as browsers tell by `Origin`, and be of a kind that a form of another site cannot send.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarmkit.clock import SYSTEM_CLOCK, Clock

COOKIE = "swarmkit_tray"
_KEY_LASTS_S = 60.0
_MOST_KEYS = 32


@dataclass
class PageKeys:
    """The keys of links that were made and not used, and the one cookie that they are exchanged for."""

    clock: Clock = SYSTEM_CLOCK
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _made: dict[str, float] = field(default_factory=dict)

    def new(self) -> str:
        """Return the key of a new link."""
        key = secrets.token_urlsafe(32)
        self._made[key] = self.clock.now()
        while len(self._made) > _MOST_KEYS:
            del self._made[next(iter(self._made))]
        return key

    def use(self, key: str) -> bool:
        """Whether a key is good; it is not a second time."""
        made_at = self._made.pop(key, None)
        return made_at is not None and self.clock.now() - made_at <= _KEY_LASTS_S


def refusal(method: str, headers: Mapping[str, str], cookie: str | None, keys: PageKeys, port: int) -> str:
    """Return why a request is refused, in words; empty if it is accepted.

    Args:
        headers: with names in lower case.
        cookie: the value of our cookie that the request brought.
        port: where the pages are served.
    """
    if wrong_host(headers, port):
        return "the request is for another host"
    if cookie is None or not hmac.compare_digest(cookie.encode(), keys.cookie.encode()):
        return "open this page from the tray's menu, or with `swarmkit tray --open`"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "the request comes from a page of another site"
    if method in ("GET", "HEAD"):
        return ""
    if headers.get("origin") != f"http://{headers['host']}":
        return "the request comes from a page of another site"
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return "the body has to be application/json"
    return ""


def wrong_host(headers: Mapping[str, str], port: int) -> bool:
    """Whether a request was made for another name than ours, as after a name was made to point here."""
    return headers.get("host") not in (f"127.0.0.1:{port}", f"localhost:{port}")
