"""Who may use the tray's pages."""

from __future__ import annotations

import pytest
from swarmkit_app.tray.page_access import PageKeys, refusal

from tests.clocks import SetClock

PORT = 4321
HERE = f"http://127.0.0.1:{PORT}"
OURS = {"host": f"127.0.0.1:{PORT}", "origin": HERE, "content-type": "application/json"}


@pytest.fixture
def keys() -> PageKeys:
    return PageKeys()


def test_a_page_of_ours_may_change_something(keys: PageKeys) -> None:
    assert refusal("POST", OURS, keys.cookie, keys, PORT) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host": "swarmkit.example:4321"}, "another host"),
        ({"host": f"127.0.0.1:{PORT + 1}"}, "another host"),
        ({"origin": "http://evil.example"}, "another site"),
        ({"origin": "null"}, "another site"),
        ({"origin": f"http://localhost:{PORT}"}, "another site"),
        ({"sec-fetch-site": "cross-site"}, "another site"),
        ({"sec-fetch-site": "same-site"}, "another site"),
        ({"content-type": "text/plain"}, "application/json"),
        ({"content-type": "application/x-www-form-urlencoded"}, "application/json"),
    ],
)
def test_a_request_from_elsewhere_is_refused(keys: PageKeys, changes: dict[str, str], why: str) -> None:
    assert why in refusal("POST", {**OURS, **changes}, keys.cookie, keys, PORT)


@pytest.mark.parametrize("cookie", [None, "", "something else", "ä"])
def test_a_request_without_the_cookie_is_refused(keys: PageKeys, cookie: str | None) -> None:
    assert "tray's menu" in refusal("GET", OURS, cookie, keys, PORT)


def test_another_site_may_not_even_read(keys: PageKeys) -> None:
    assert "another site" in refusal("GET", {**OURS, "sec-fetch-site": "cross-site"}, keys.cookie, keys, PORT)


def test_a_key_works_once(keys: PageKeys) -> None:
    key = keys.new()
    assert [keys.use(key), keys.use(key)] == [True, False]


def test_a_key_works_for_a_minute() -> None:
    clock = SetClock()
    keys = PageKeys(clock)
    key = keys.new()
    clock.seconds += 61
    assert not keys.use(key)


def test_a_guessed_key_is_refused(keys: PageKeys) -> None:
    keys.new()
    assert not keys.use("")
