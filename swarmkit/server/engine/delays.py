"""How much longer others make a client wait for its tokens, and may: decisions only, over plain data.

A *round* is what a server sees of a client's token: the client is away, then its step waits, and then it
runs, perhaps beside steps of others. What it waited, and what its pass took longer than one over the client's
own tokens takes, others have *delayed* it by::

    away        waited       ran
    ├──────────┼───────────┼─────────────────────┤
                ╰─────────╯ ╰──────────╯          what others did first, or beside it
    ╰─────────╯                         ╰────────╯ what the round takes without them

Of n clients that share a device alike, each has its part if others make its rounds n times as long at most.
So each round allows for a delay in proportion to what it takes without others. What they delay a client by
beyond that they *owe* it: that is measured, not predicted, whatever has taken the time. While a client is
owed something, training, crowds and prompts of others wait (see `scheduler`), but for no longer than is owed,
so that a client that stays away keeps nobody from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from swarmkit.ewma import Ewma
from swarmkit.net.transport.shares import Holder

_ALLOWED = 0.4
"""Of what the shares of others would allow for. The rest is for what cannot be measured here: while others'
messages come and go, this client's wait for them, and what its own round takes seems longer than it is."""
_SAVED_ROUNDS = 2.0
"""So many rounds' delays may come at once, without anything being owed for them."""
_MOST_OWED_S = 0.25
_FOR_S = 2.0
"""A client that has not decoded for so long is owed nothing any more."""
_AWAY_WEIGHT = 0.25  # of the latest time away
_LONGEST_AWAY_S = 2.0
"""For which a round allows."""


@dataclass(frozen=True)
class DecodeRound:
    """One round of a client, in seconds."""

    away_s: float
    waited_s: float
    ran_s: float
    alone_s: float
    """What a pass over the client's own tokens takes."""

    @property
    def delay_s(self) -> float:
        """What others have made it longer."""
        return max(self.waited_s, 0.0) + max(self.ran_s - self.alone_s, 0.0)

    def allowed_s(self, others: float) -> float:
        """What they may make it longer, if they have `others` times the share that this client has."""
        return _ALLOWED * others * (min(self.away_s, _LONGEST_AWAY_S) + self.alone_s)


def balance_after(balance_s: float, one: DecodeRound, others: float) -> float:
    """Return the seconds of delay that a client can still have after a round; negative: what it is owed."""
    allowed_s = one.allowed_s(others)
    most_s = max(_SAVED_ROUNDS * allowed_s, 0.0)
    return max(min(balance_s + allowed_s, most_s) - one.delay_s, -_MOST_OWED_S)


def shares_of_others(client: Holder, active: Iterable[Holder]) -> float:
    """Return how many times a client's share all others have: hosts share alike, and the peers of each host.

    At least 1: some that take a device's time, such as with training, are not among those that decode.
    """
    everybody = {client, *active}
    hosts = {one.host for one in everybody}
    peers = sum(one.host == client.host for one in everybody)
    return max(len(hosts) * peers - 1, 1)


def crowds_of(
    waiting: Mapping[Holder, int], run: Mapping[Holder, int], active: Iterable[Holder]
) -> set[Holder]:
    """Return the clients that have more steps here than run in a pass, so that they wait for their own.

    Where clients come from several hosts, the clients of a host that has more are crowds too.

    Args:
        waiting: how many steps of each client are here, and `run`: how many of them run.
        active: all clients that share the device.
    """
    several = len({client.host for client in (*active, *waiting)}) > 1
    left = {
        client.host if several else client
        for client, number in waiting.items()
        if number > run.get(client, 0)
    }
    return {client for client in run if (client.host if several else client) in left}


class Owed(NamedTuple):
    """What others owe a client, and when its next step is here."""

    seconds: float
    in_s: float
    """Seconds until its next step arrives, as usual; negative: since when it is late."""

    @property
    def is_worth_waiting(self) -> bool:
        """Whether its next step may be waited for: it is not later than is owed."""
        return self.in_s > -self.seconds


OTHERS_WAIT_PASSES = 8
"""So many passes over one token are run without a crowd, or a prompt, while another client is owed something.
It may be a third one that has delayed that client."""

NOTHING_OWED: Mapping[Holder, Owed] = {}
NO_STEPS: Mapping[Holder, int] = {}


def prompts_wait(
    owed: Mapping[Holder, Owed], prompts: Mapping[Holder, int], decoding: Set[Holder], within_s: float
) -> bool:
    """Whether prompts wait for another client that is owed something, and decodes here or will be back soon.

    Args:
        prompts: the turns for which each client has had no part of a prompt run, of those that have some. Not
            empty.
        decoding: the clients with decode steps here.
        within_s: seconds that are soon.
    """
    return max(prompts.values()) < OTHERS_WAIT_PASSES and any(
        client not in prompts and (client in decoding or (one.in_s < within_s and one.is_worth_waiting))
        for client, one in owed.items()
    )


@dataclass
class _Account:
    done: float
    away: Ewma | None = None
    balance_s: float = 0.0


class Decoded(Protocol):
    """A decode step that was run."""

    client: Holder
    rows: int
    tokens: int
    queued_at: float


class TimesOfPasses(Protocol):
    """How long passes take."""

    def shortest(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens; 0 if that is not known."""


class Pass(NamedTuple):
    """A pass that is over: when it began and was done, with all that is done around it; the seconds on the
    device; the number of its steps; and how long passes take.
    """

    began: float
    done: float
    device_s: float
    steps: int
    times: TimesOfPasses


@dataclass
class Delays:
    """What others owe each client that has decoded lately. Time is handed in."""

    _accounts: dict[Holder, _Account] = field(default_factory=dict)
    """The client that decoded last is the last one."""

    def __len__(self) -> int:
        """How many clients are known."""
        return len(self._accounts)

    def ran(
        self,
        decodes: Sequence[Decoded],
        took: Pass,
        waiting: Mapping[Holder, int],
        recent: Mapping[Holder, int],
    ) -> None:
        """A pass in which these decode steps had a part is over.

        Args:
            waiting: the steps that each client had there when it began, those that ran included.
            recent: the clients that have decoded lately.
        """
        of_clients: dict[Holder, list[Decoded]] = {}
        for step in decodes:
            of_clients.setdefault(step.client, []).append(step)
        active = recent.keys() | waiting.keys()
        crowds = crowds_of(waiting, {client: len(own) for client, own in of_clients.items()}, active)
        took_s = took.done - took.began
        for client, own in of_clients.items():
            if client in crowds:
                self.forget(client)
                continue
            alone_s = took.times.shortest(sum(step.rows * step.tokens for step in own))
            around_s = (took_s - took.device_s) * len(own) / took.steps
            ran_s = took_s - around_s if len(own) < took.steps else alone_s
            came, others = min(step.queued_at for step in own), shares_of_others(client, active)
            self.decoded(client, came, took.began, ran_s, alone_s, took.done, others)

    def decoded(
        self,
        client: Holder,
        came: float,
        began: float,
        ran_s: float,
        alone_s: float,
        done: float,
        others: float,
    ) -> None:
        """A client's steps that came at `came` have run in a pass that began at `began`.

        Args:
            ran_s: seconds of the pass, without what its own steps take before and after it.
            alone_s: of one over the client's own tokens; 0 if that is not known.
            done: when the client was answered.
            others: see `shares_of_others`.
        """
        account = self._accounts.pop(client, None)
        if account is None or done - account.done > _FOR_S:
            self._accounts[client] = _Account(done)
            return
        came = max(came, account.done)  # before that it waited for its own steps
        away_s = came - account.done
        if account.away is None:
            account.away = Ewma(away_s, 0.0, _AWAY_WEIGHT)
        else:
            account.away.observe(away_s)
        one = DecodeRound(away_s, began - came, ran_s, alone_s or ran_s)
        account.balance_s = balance_after(account.balance_s, one, others)
        account.done = done
        self._accounts[client] = account

    def forget(self, client: Holder) -> None:
        """A client has more steps here than run at a time; most of what they wait for is its own."""
        self._accounts.pop(client, None)

    def owed(self, now: float) -> Mapping[Holder, Owed]:
        """What each client that is owed anything is owed now."""
        accounts = self._accounts
        while accounts and (first := next(iter(accounts.items())))[1].done < now - _FOR_S:
            del accounts[first[0]]
        return {
            client: Owed(-one.balance_s, one.done + one.away.mean - now)
            for client, one in accounts.items()
            if one.balance_s < 0 and one.away is not None
        }
