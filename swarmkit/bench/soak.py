"""Does a swarm stay as it was, whatever its clients do?

Clients come, answer, talk with pauses, are cut off, cancelled, walk away and are killed, while the servers'
caches are too small for all of them. When all have left, each server is asked what it still holds, and that
is compared with what it held after a short run of the same before.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import msgspec
import torch

from swarmkit.bench.measure import random_prompt
from swarmkit.bench.options import Soak
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.errors import SwarmkitError
from swarmkit.local.server_process import ServerProcess
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.models.plan import cache_cost
from swarmkit.net import portal
from swarmkit.net.connect import over_hivemind
from swarmkit.net.protocol.messages import GetResources, Resources
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.rpc.server_info import ask
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import Transport
from swarmkit.settings import ServerSettings

_STAGES, _REPLICAS = 2, 2
_CACHE_TOKENS, _LEAST_CACHE_TOKENS = 96, 1280
"""A server's, for each client, and at least: so little that some have to wait, and idle ones to make room."""
_SESSIONS = 3 / 8
"""Of each client, on each of two servers: less than there are."""
_PROMPTS = 8
_PROMPT_TOKENS = (4, 400)
_NEW_TOKENS = 16
_LONG_TOKENS = 1024
_CLEAR_MARGIN = 1e-3
"""By which the first token of a kind is ahead of the second: rounding must not decide what is right."""
_WARM_UP_S = 8.0
_READY_S = 600.0
_LEAVE_S = 240.0
_SETTLE_S = 90.0
_BASELINE_LOOKS = 5
_ASK_TIMEOUT_S = 10.0
_LEFT = ("sessions", "pushers", "leased_bytes", "receive_budget_bytes", "works")
"""The resources that must be zero when no client is there."""
_GROWN = ("streams", "tasks", "threads", "descriptors")
"""What must not be more than before."""


def measure(options: Soak, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Let so many clients loose on two stages with two servers each; `sound` says whether nothing was left.

    The clients are threads of so many processes; every `kill_every_s` seconds one of these is killed with
    SIGKILL, and another one comes.
    """
    torch.set_num_threads(options.threads)
    chance = random.Random(options.seed)
    on_progress("computing what is right", 0, 1)
    answers = clear_answers(subject)
    bytes_per_token = cache_cost(subject.checkpoint, torch.float32).token_bytes
    cache_tokens = max(_LEAST_CACHE_TOKENS, options.clients * _CACHE_TOKENS)
    settings = ServerSettings().replace(
        cache_bytes=cache_tokens * bytes_per_token * subject.checkpoint.num_blocks // _STAGES,
        max_sessions=max(2, int(options.clients * _SESSIONS)),
        evict_after_s=1.0,
        report_resources=True,
    )
    on_progress("starting servers", 0, 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=_STAGES,
        replicas=_REPLICAS,
        processes=True,
        threads=options.threads,
        dtype="float32",
        server_settings=settings,
    ) as swarm:
        counts: Counter[str] = Counter()
        errors: list[str] = []
        shares = [
            options.clients // options.processes + (n < options.clients % options.processes)
            for n in range(min(options.processes, options.clients))
        ]
        with _counting(swarm) as take_census:
            on_progress("warming up", 0, 1)
            with _crowd(subject, swarm, answers, shares, seed=options.seed) as crowd:
                crowd.live(_WARM_UP_S, 0.0, chance, lambda done: None)
            before = _baseline(take_census)
            with _crowd(subject, swarm, answers, shares, seed=options.seed + 1) as crowd:
                crowd.live(
                    options.minutes * 60,
                    options.kill_every_s,
                    chance,
                    lambda done: on_progress("soaking", int(done), int(options.minutes * 60)),
                )
            counts, errors = crowd.counts, crowd.errors
            on_progress("waiting until all is quiet", 0, 1)
            after = _settled(take_census, before)
    left = [line for name in before for line in what_is_left(name, before[name], after.get(name))]
    wrong = counts["answered wrongly"] + counts["failed"] + counts["stuck"] + counts["unasked end"]
    return {
        **options.values("minutes", "clients", "processes"),
        "servers": _STAGES * _REPLICAS,
        **options.values("threads", "seed"),
        "counts": dict(sorted(counts.items())),
        "errors": errors[:20],
        "before": {name: msgspec.to_builtins(census) for name, census in before.items()},
        "after": {name: msgspec.to_builtins(census) for name, census in after.items()},
        "left": left,
        "sound": not left and not wrong and counts["answered"] > 0,
    }


def clear_answers(subject: Subject) -> list[list[int]]:
    """Prompts of many lengths with the local model's greedy tokens, of which none was a close decision."""
    local: Any = load_local(subject.checkpoint, dtype="float32")
    found: list[list[int]] = []
    low, high = _PROMPT_TOKENS
    for seed in range(20 * _PROMPTS):
        length = low + (high - low) * (len(found) % 4) // 3
        prompt = random_prompt(subject.vocab_size, length, seed=seed)
        out = local.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(out.logits).float().topk(2, dim=-1).values
        if float((best[..., 0] - best[..., 1]).min()) > _CLEAR_MARGIN:
            found.append(out.sequences[0].tolist())
        if len(found) == _PROMPTS:
            break
    if not found:
        raise SwarmkitError("this model never decides clearly; take another one")
    return found


def what_is_left(name: str, before: Resources, after: Resources | None) -> list[str]:
    """One line for each thing that a server still holds, or holds more of than before."""
    if after is None:
        return [f"{name} does not answer"]
    left = [f"{name}: {getattr(after, each)} {each}" for each in _LEFT if getattr(after, each)]
    left += [
        f"{name}: {getattr(after, each)} {each}, before {getattr(before, each)}"
        for each in _GROWN
        if getattr(after, each) > getattr(before, each)
    ]
    if not after.accounted or after.leased_bytes + after.kept_bytes > after.capacity_bytes:
        left.append(f"{name}: the bytes of its cache do not add up")
    return left


def most(seen: Sequence[Resources]) -> Resources:
    """What a server had of all that comes and goes by itself, at its largest."""
    return msgspec.structs.replace(
        seen[-1], **{each: max(getattr(census, each) for census in seen) for each in _GROWN}
    )


class _Crowd:
    """Processes full of clients."""

    def __init__(self, start: Any, shares: Sequence[int]) -> None:
        self._start = start
        self._shares = list(shares)
        self._members: list[_Member] = []
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def come(self) -> None:
        for share in self._shares:
            self._add(share)
        for member in self._members:
            member.wait_until_ready()

    def _add(self, share: int) -> _Member:
        member = self._start(self.heard, share)
        self._members.append(member)
        return member

    def live(self, seconds: float, kill_every_s: float, chance: random.Random, on_time: Any) -> None:
        """Let them live for so long, and kill one now and then."""
        began = time.monotonic()
        kill_at = began + kill_every_s
        while (done := time.monotonic() - began) < seconds:
            on_time(done)
            time.sleep(min(0.5, seconds - done))
            for member in [m for m in self._members if not m.alive]:
                self.heard(
                    {"did": "unasked end", "error": f"a client process ended by itself: {member.code}"}
                )
                self._members.remove(member)
                self._add(member.share)
            if kill_every_s and time.monotonic() > kill_at:
                kill_at = time.monotonic() + kill_every_s
                victim = chance.choice(self._members)
                self._members.remove(victim)
                victim.kill()
                self.counts["killed"] += victim.share
                self._add(victim.share)

    def leave(self) -> None:
        for member in self._members:
            member.ask_to_leave()
        for member in self._members:
            if not member.wait(_LEAVE_S):
                self.heard({"did": "stuck", "error": "a client process did not leave"})
                member.kill()

    def heard(self, line: dict[str, Any]) -> None:
        """Something that a client did."""
        with self._lock:
            did = line["did"]
            self.counts[line["kind"] if did == "event" else did] += 1
            if "error" in line:
                self.errors.append(line["error"])


class _Member:
    """One process of clients."""

    def __init__(self, options: dict[str, Any], heard: Any) -> None:
        self.share: int = options["clients"]
        self._heard = heard
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.bench.soak_process", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
        )
        self._reader = threading.Thread(target=self._read, name="swarmkit-soak-reader", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def wait_until_ready(self) -> None:
        if not self._ready.wait(_READY_S) or not self.alive:
            raise SwarmkitError("a client of the soak did not start; what it said is above")

    def ask_to_leave(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._close()
        return True

    def kill(self) -> None:
        """SIGKILL; its p2p daemon follows by itself, as in a crash."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self.ask_to_leave()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError, KeyError):  # the last line of one that is killed may be half a one
                told = json.loads(line)
                if told["did"] == "ready":
                    self._ready.set()
                self._heard(told)
        self._ready.set()


@contextmanager
def _crowd(
    subject: Subject, swarm: LocalSwarm, answers: list[list[int]], shares: Sequence[int], *, seed: int
) -> Iterator[_Crowd]:
    """Clients that are there in the block, and have left after it."""
    seeds = iter(range(seed * 10_000, seed * 10_000 + 10_000))

    def start(heard: Any, share: int) -> _Member:
        options = {
            "name": subject.checkpoint.name,
            "peers": swarm.initial_peers,
            "answers": answers,
            "new_tokens": _NEW_TOKENS,
            "long_tokens": _LONG_TOKENS,
            "clients": share,
            "seed": next(seeds),
        }
        return _Member(options, heard)

    crowd = _Crowd(start, shares)
    with ExitStack() as owned:
        owned.callback(crowd.leave)
        crowd.come()
        yield crowd


@contextmanager
def _counting(swarm: LocalSwarm) -> Iterator[Any]:
    """A function that asks every server what it holds."""
    with portal.lease() as lease:
        transport: Transport = lease.call(
            over_hivemind(swarm.initial_peers, client_mode=True), Identity(), acceptable_now
        )

        def take_census() -> dict[str, Resources]:
            found: dict[str, Resources] = {}
            for server in swarm.servers:
                assert isinstance(server, ServerProcess)
                with suppress(SwarmkitError, TimeoutError):
                    reply = lease.call(
                        ask, transport, server.peer_id, server.addresses, GetResources(), _ASK_TIMEOUT_S
                    )
                    assert isinstance(reply, Resources)
                    found[server.public_name] = reply
            return found

        try:
            yield take_census
        finally:
            lease.call(transport.close)


def _baseline(take_census: Any) -> dict[str, Resources]:
    """The most that servers have of everything in five seconds in which no client is there."""
    give_up_at = time.monotonic() + _SETTLE_S
    seen: list[dict[str, Resources]] = []
    while len(seen) < _BASELINE_LOOKS:
        now = take_census()
        quiet_now = not any(what_is_left(name, census, census) for name, census in now.items())
        seen = [*seen, now] if quiet_now or time.monotonic() > give_up_at else []
        time.sleep(1.0)
    return {name: most([census[name] for census in seen if name in census]) for name in seen[-1]}


def _settled(take_census: Any, before: dict[str, Resources]) -> dict[str, Resources]:
    """The census once nothing is left, or as it is when that has not come about for long."""
    give_up_at = time.monotonic() + _SETTLE_S
    while True:
        now: dict[str, Resources] = take_census()
        left = any(what_is_left(name, before[name], now.get(name)) for name in before)
        if not left or time.monotonic() > give_up_at:
            return now
        time.sleep(1.0)
