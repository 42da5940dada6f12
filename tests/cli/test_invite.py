"""`swarmkit invite` and `swarmkit swarm-key`: how people come to belong to a swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.client.status import swarm_status
from swarmkit.errors import TransportError, UsageError
from swarmkit.net.transport.invite import read_link
from swarmkit.net.transport.swarm_key import SwarmKey

from .commands import Running, run_here, start

pytestmark = pytest.mark.usefixtures("kept_fork_server")

ADDRESS = "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooWAabcYN2M2JFtbPW8TJZBjR4dcfpZPiM2HPBkndYRMjus"


def link_of(*arguments: str) -> str:
    """What `swarmkit invite` prints."""
    made = run_here("invite", *arguments)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def identity(path: Path) -> str:
    """The peer id of a new identity file."""
    return run_here("identity", str(path)).stdout.strip()


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """The folder of an owner: `team.key` and `owner.key`."""
    made = run_here("swarm-key", "create", str(tmp_path / "team.key"), "--owner", str(tmp_path / "owner.key"))
    assert made.returncode == 0, made.stderr
    return tmp_path


# links


def test_a_link_of_an_open_swarm_holds_addresses_alone() -> None:
    link = link_of("--join", ADDRESS, "--model", "tiny-chat", "--days", "1")
    shown = json.loads(run_here("invite", "--show", link, "--json").stdout)
    assert (shown["addresses"], shown["model"], shown["private"]) == ([ADDRESS], "tiny-chat", False)


def test_a_link_passes_on_another_one() -> None:
    first = link_of("--join", ADDRESS)
    assert read_link(link_of("--join", first), 0.0).addresses == (ADDRESS,)


def test_a_link_leads_somewhere() -> None:
    made = run_here("invite")
    assert (made.returncode, "--join ADDRESS" in made.stderr) == (1, True)


def test_a_damaged_link_is_told_of_wherever_addresses_are_taken() -> None:
    link = link_of("--join", ADDRESS)
    ended = run_here("status", "--join", link[:-4])
    assert (ended.returncode, "is cut off" in ended.stderr) == (1, True)


# certificates


def test_a_member_without_the_role_invite_invites_nobody(owned: Path) -> None:
    me = identity(owned / "me.key")
    sign = ("swarm-key", "sign", str(owned / "team.key"), "--identity", str(owned / "owner.key"))
    assert run_here(*sign, "--peer", me, "--out", str(owned / "mine.key")).returncode == 0
    refused = run_here(
        "invite",
        "--join",
        ADDRESS,
        "--swarm-key",
        str(owned / "mine.key"),
        "--identity",
        str(owned / "me.key"),
    )
    assert (refused.returncode, "may not invite" in refused.stderr) == (1, True)


def test_a_member_with_the_role_invite_allows_no_more_and_no_longer_than_its_own(owned: Path) -> None:
    me = identity(owned / "me.key")
    sign = ("swarm-key", "sign", str(owned / "team.key"), "--identity", str(owned / "owner.key"))
    roles = ("--role", "use", "--role", "invite", "--days", "2")
    assert run_here(*sign, "--peer", me, *roles, "--out", str(owned / "mine.key")).returncode == 0
    mine = ("--join", ADDRESS, "--swarm-key", str(owned / "mine.key"), "--identity", str(owned / "me.key"))
    refused = run_here("invite", *mine, "--role", "serve")
    assert (refused.returncode, "allows more" in refused.stderr) == (1, True)
    link = read_link(link_of(*mine, "--days", "90"), 0.0)
    key = link.swarm_key()
    assert key is not None
    assert key.members is not None
    first, second = (signed.certificate for signed in key.members.chain)
    assert (second.expires_at, link.expires_at) == (first.expires_at,) * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--role", "rule"), "no role rule"),
        (("--peer", "nobody at all"), "no certificate can be made"),
    ],
)
def test_what_cannot_be_signed_is_named(owned: Path, arguments: tuple[str, ...], words: str) -> None:
    key = ("--swarm-key", str(owned / "team.key"), "--identity", str(owned / "owner.key"))
    ended = run_here("invite", "--join", ADDRESS, *key, *arguments)
    assert (ended.returncode, words in ended.stderr) == (1, True)


def test_only_the_owner_takes_back(owned: Path) -> None:
    identity(owned / "me.key")
    ended = run_here(
        "swarm-key", "revoke", str(owned / "team.key"), "--identity", str(owned / "me.key"), "--peer", "x"
    )
    assert (ended.returncode, "only the owner" in ended.stderr) == (1, True)


def test_what_was_taken_back_is_shown_and_numbered(owned: Path) -> None:
    me = identity(owned / "me.key")
    revoke = ("swarm-key", "revoke", str(owned / "team.key"), "--identity", str(owned / "owner.key"))
    for _ in range(2):
        assert run_here(*revoke, "--peer", me).returncode == 0
    assert run_here(*revoke, "--serial", "00" * 8).returncode == 0
    shown = json.loads(run_here("swarm-key", "show", str(owned / "team.key"), "--json").stdout)
    assert (shown["revoked_peers"], shown["revoked_serials"]) == ([me], ["00" * 8])
    members = SwarmKey.load(owned / "team.key").members
    assert members is not None
    assert members.revocations is not None
    assert members.revocations.number == 2


def test_a_key_file_shows_no_secret(owned: Path) -> None:
    secret = (owned / "team.key").read_text().split("secret ")[1].split()[0]
    shown = run_here("swarm-key", "show", str(owned / "team.key"))
    assert secret not in shown.stdout + shown.stderr


# with real peers


@pytest.fixture
def meeting_point(owned: Path) -> Iterator[Running]:
    """The owner's own, in a private swarm with an owner."""
    running = start(
        "bootstrap",
        "--swarm-key",
        str(owned / "team.key"),
        "--identity",
        str(owned / "owner.key"),
        until="listening",
    )
    yield running
    running.end_with(15)


def test_a_link_lets_its_bearer_in_until_the_owner_takes_it_back(owned: Path, meeting_point: Running) -> None:
    owner = ("--swarm-key", str(owned / "team.key"), "--identity", str(owned / "owner.key"))
    link = link_of("--join", meeting_point.address, *owner)
    bare = link_of("--join", meeting_point.address)
    assert swarm_status([link]) == []  # joined, and nothing is served
    with pytest.raises(TransportError, match="is private"):
        swarm_status([bare])
    key = read_link(link, 0.0).swarm_key()
    assert key is not None
    assert key.identity is not None
    revoke = ("swarm-key", "revoke", owner[1], "--identity", owner[3], "--peer", key.identity.peer_id)
    assert run_here(*revoke).returncode == 0
    meeting_point.end_with(15)
    again = start("bootstrap", *owner, until="listening")  # which has the list beside its key
    try:
        with pytest.raises(TransportError, match="taken back"):
            swarm_status([link_of("--join", again.address)], swarm_key=key)
    finally:
        again.end_with(15)


@pytest.mark.slow
def test_a_meeting_point_keeps_its_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    names = []
    for _ in range(2):
        running = start("bootstrap", until="listening")
        names.append(running.event["peer_id"])
        running.end_with(15)
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_meeting_points_at_once_have_two_identities(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    both = [start("bootstrap", until="listening") for _ in range(2)]
    for running in both:
        running.end_with(15)
    assert both[0].event["peer_id"] != both[1].event["peer_id"]


def test_a_link_beside_the_key_of_another_swarm_is_refused(owned: Path) -> None:
    SwarmKey().save(owned / "other.key")
    link = link_of(
        "--join", ADDRESS, "--swarm-key", str(owned / "team.key"), "--identity", str(owned / "owner.key")
    )
    with pytest.raises(UsageError, match="not of the swarm"):
        swarm_status([link], swarm_key=owned / "other.key")
