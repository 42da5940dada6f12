"""The tray's pages over HTTP: only a link of the tray opens them, and they do what the worker allows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from swarmkit_app.tray.pages import TrayPages

from swarmkit.net.transport.invite import InviteLink, write_link
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.worker import autostart
from swarmkit.worker.places import WorkerPlaces
from tests.waiting import wait_until
from tests.worker.worlds import RunningWorker, not_ours


@pytest.fixture
def pages(worker: RunningWorker, places: WorkerPlaces) -> Iterator[TrayPages]:
    with TrayPages(worker.client, places, lambda: None) as pages:
        yield pages


@pytest.fixture
def browser(pages: TrayPages) -> Iterator[httpx.Client]:
    """What a browser is after it has opened a link of the tray."""
    origin = f"http://127.0.0.1:{pages.port}"
    with httpx.Client(base_url=origin, headers={"Origin": origin}, timeout=30) as client:
        client.get(pages.link())
        yield client


def test_a_link_opens_the_page_that_it_names(pages: TrayPages) -> None:
    with httpx.Client() as client:
        answer = client.get(pages.link("settings"))
        assert (answer.status_code, answer.headers["location"]) == (303, "/#settings")


def test_the_cookie_is_closed_to_scripts_and_other_sites(pages: TrayPages) -> None:
    cookie = httpx.get(pages.link()).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie


def test_a_link_opens_once(pages: TrayPages) -> None:
    link = pages.link()
    assert [httpx.get(link).status_code for _ in range(2)] == [303, 403]


def test_without_the_link_nothing_is_shown(pages: TrayPages) -> None:
    answer = httpx.get(f"http://127.0.0.1:{pages.port}/api/status")
    assert (answer.status_code, "tray's menu" in answer.text) == (403, True)


def test_a_page_of_another_site_changes_nothing(browser: httpx.Client, worker: RunningWorker) -> None:
    answer = browser.post("/api/pause", json={}, headers={"Origin": "http://evil.example"})
    assert (answer.status_code, worker.status().pause) == (403, None)


def test_a_page_pauses_the_worker(browser: httpx.Client, worker: RunningWorker) -> None:
    worker.serve()
    browser.post("/api/pause", json={"until": "seconds", "seconds": 900}).raise_for_status()
    pause = worker.status().pause
    assert pause is not None
    assert pause.until == "seconds"


def test_settings_are_changed(browser: httpx.Client, worker: RunningWorker) -> None:
    changes = {"limits": {"cpu_cores": {"in_use": 1, "away": 3}}}
    browser.patch("/api/settings", json=changes).raise_for_status()
    assert worker.client.settings().limits.cpu_cores.away == 3


@pytest.mark.parametrize(
    "changes", [{"limits": {"cpu_cores": {"in_use": 0, "away": 1}}}, {"nonsense": 1}, {"agreed": "maybe"}]
)
def test_a_setting_that_is_not_allowed_is_refused_in_words(browser: httpx.Client, changes: object) -> None:
    answer = browser.patch("/api/settings", json=changes)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize("body", [b"[]", b"nonsense", b"[" * 60_000])
def test_a_body_that_is_no_object_is_refused(browser: httpx.Client, body: bytes) -> None:
    answer = browser.post("/api/pause", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_a_body_that_is_too_large_is_refused(browser: httpx.Client) -> None:
    answer = browser.patch("/api/settings", json={"serve": {"name": "x" * 100_000}})
    assert answer.status_code == 413


def test_the_pages_say_that_the_worker_has_ended(browser: httpx.Client, worker: RunningWorker) -> None:
    worker.close()
    answer = browser.get("/api/status")
    assert (answer.status_code, answer.json()["no_worker"]) == (503, True)


def test_the_start_at_log_in_is_off_until_chosen(
    browser: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    before = browser.get("/api/autostart").json()
    after = browser.post("/api/autostart", json={"on": True}).json()
    entry = autostart.entry_path().read_text()
    assert (before, after) == ({"on": False}, {"on": True})
    assert '"-m" "swarmkit.cli" "tray"' in entry
    browser.post("/api/autostart", json={"on": False})
    assert list((tmp_path / "autostart").iterdir()) == []


def test_an_invite_link_of_a_private_swarm_says_what_it_is_for_and_is_kept(
    browser: httpx.Client, worker: RunningWorker
) -> None:
    addresses = tuple(f"/ip4/192.0.2.{number}/tcp/31337/p2p/{'Q' * 52}" for number in range(16))
    link = write_link(InviteLink(addresses, 4e9, SwarmKey(bytes(32)).to_bytes(), "some/model"))
    told = browser.post("/api/invite", json={"link": link}).json()
    browser.patch("/api/settings", json={"serve": {"join": [link]}}).raise_for_status()
    assert told == {"model": "some/model", "private": True, "expires_at": 4e9}
    assert worker.client.settings().serve.join == (link,)


def test_an_invite_link_that_was_cut_off_is_refused_in_words(browser: httpx.Client) -> None:
    link = write_link(InviteLink(("/ip4/192.0.2.7/tcp/31337/p2p/Q",), 4e9))
    answer = browser.post("/api/invite", json={"link": link[:-4]})
    assert (answer.status_code, "is cut off" in answer.json()["error"]) == (400, True)


def test_suggested_limits_leave_most_to_the_owner(browser: httpx.Client, worker: RunningWorker) -> None:
    found = browser.get("/api/computer").json()
    limits = found["suggested"]["limits"]
    assert limits["ram_bytes"]["in_use"] <= max(found["computer"]["memory"] / 8, 2**29)
    worker.client.change_settings(found["suggested"])


def test_programs_that_run_are_named_but_for_our_own(browser: httpx.Client, tmp_path: Path) -> None:
    theirs, ours = (tmp_path / f"{whose}-{os.getpid()}" for whose in ("theirs", "ours"))
    for program in (theirs, ours):
        program.symlink_to("/bin/sleep")
    with not_ours(theirs, "600"), subprocess.Popen([ours, "600"]) as child:
        wait_until(lambda: theirs.name in browser.get("/api/programs").json(), "it is seen", every=0.05)
        found = browser.get("/api/programs").json()
        child.kill()
    assert ours.name not in found


def test_nothing_is_asked_of_another_machine(browser: httpx.Client) -> None:
    assert browser.get("/").headers["content-security-policy"].startswith("default-src 'self'")
