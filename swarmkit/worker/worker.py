"""`BackgroundWorker`: the root of everything that a worker does. All of it is one task, `run`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskStatus
from filelock import FileLock, Timeout

from swarmkit._version import __version__
from swarmkit.clock import Clock
from swarmkit.errors import UsageError
from swarmkit.events import Event, EventStream, Owner
from swarmkit.sizes import format_bytes
from swarmkit.worker.belongings import belongings, size_of
from swarmkit.worker.contributions import Contributions, Share
from swarmkit.worker.control.app import ConflictError
from swarmkit.worker.control.listener import listening
from swarmkit.worker.control.values import (
    Belongings,
    Day,
    LeaseGranted,
    LeaseRequest,
    LeaseStatus,
    NodeStatus,
    State,
    Stats,
    Status,
)
from swarmkit.worker.governor import Governor
from swarmkit.worker.node_messages import FromNode, NodeOrder, NodeReport, Runtime
from swarmkit.worker.node_supervisor import NODE_COMMAND, NodeSupervisor, Wanted
from swarmkit.worker.pause import Pause, PauseRequest
from swarmkit.worker.places import WorkerPlaces, write_atomically
from swarmkit.worker.policy import Decision, Reason, Situation, decide, seconds_away
from swarmkit.worker.process_tree import Used, used_by
from swarmkit.worker.restarts import MANY_FAILURES
from swarmkit.worker.sensing.machine import MachineSensing, OwnMachine, SensingOrder
from swarmkit.worker.sensing.sleep import SleepWatch
from swarmkit.worker.settings import WorkerSettings, changed, load_settings, save_settings
from swarmkit.worker.signals import MachineSignals, SessionSignals
from swarmkit.worker.wakeful_clock import ClockWatch, WakefulClock
from swarmkit.worker.worker_events import WorkerSettingsChanged, WorkerStateChanged, WorkerTrouble

logger = logging.getLogger(__name__)

LEASE_S = 5.0
"""How long a tray's lease holds while there is a node process, or there is to be one."""
IDLE_LEASE_S = 15.0
"""How long it holds otherwise: nothing runs then that could disturb anybody."""
_TICK_S = 1.0
_SENSE_PERIOD_S = 2.0
_REST_PERIOD_S = 15.0
_AT_REST = (Reason.NOT_AGREED, Reason.NO_MODEL, Reason.ASKED)
"""Reasons that nothing which is sensed can change."""
_WRITE_PERIOD_S = 30.0
_KEEP_ALIVE_S = 15.0
_QUOTA_RESERVE_S = 4.0
"""The node is stopped when this month's rest would last for so many seconds at the highest rate lately."""
_QUOTA_RESERVE_BYTES = 4 * 2**20
"""It is stopped at this rest in any case."""
_STOP_WITHIN_S = 60.0


class WorkerRunsError(UsageError):
    """Another worker of the same person runs."""


class _Lease(msgspec.Struct, frozen=True):
    request: LeaseRequest
    told_at: float
    """By the clock's `now`, as is `until`."""
    until: float


class BackgroundWorker:
    """Lends this computer to a swarm, within the person's settings. Everything runs on one event loop."""

    def __init__(
        self,
        places: WorkerPlaces,
        *,
        clock: Clock | None = None,
        sensing: MachineSensing | None = None,
        sleep_watch: SleepWatch | None = None,
        node_command: Sequence[str] = NODE_COMMAND,
        loopback: bool = False,
    ) -> None:
        """Prepare a worker.

        Args:
            clock: whose durations go on while the computer sleeps.
            sensing: tells what the machine does.
            sleep_watch: tells when the computer is about to sleep.
            node_command: starts a node process.
            loopback: listen on loopback also where there are Unix sockets.
        """
        self._places = places
        self._clock: Clock = clock or WakefulClock()
        self._sensing = sensing or OwnMachine(self._clock)
        self._sleep_watch = sleep_watch
        self._going_to_sleep = False
        self._loopback = loopback
        self.events = EventStream()
        self.settings = WorkerSettings()
        self._machine = MachineSignals()
        self._sensed = False
        self._sense_now = anyio.Event()
        self._lease: _Lease | None = None
        self._pause: Pause | None = None
        self._watch = ClockWatch(self._clock)
        self._governor = Governor()
        self._governed_at = self._clock.now()
        self._used: tuple[float, Used] | None = None
        self._cpu_cores = 0.0
        self._ram_bytes = 0
        self._tokens: deque[tuple[float, int]] = deque(maxlen=20)
        self._bytes_per_s: deque[float] = deque(maxlen=60)
        self._last_report: NodeReport | None = None
        self._counted_at = self._clock.now()
        self._disk_bytes = 0
        self._watts: float | None = None
        self._file_trouble: dict[str, str] = {}
        self._shown: tuple[str, str] = "", ""
        self._decision: Decision | None = None
        self._changed = anyio.Event()
        self._stop = anyio.Event()
        self._node = NodeSupervisor(
            self._clock, on_word=self._heard, on_state=self._node_changed, command=node_command
        )

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until `stop`, or until cancelled. It has started when its control API answers.

        Raises:
            WorkerRunsError: another worker of this person runs.
            UsageError: the folder for the token is not private.
        """
        self._places.make()
        with self._alone():
            loaded = load_settings(self._places.settings)
            self.settings = loaded.settings
            self._trouble("settings", loaded.trouble)
            self._pause = self._read_pause()
            self._history = Contributions(self._places.history, self.settings.history_days)
            try:
                await self._live(task_status)
            finally:
                self._history.write(self._clock.time())
                self._history.close()
                self.events.close()

    async def _live(self, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sense)
            tasks.start_soon(self._node.run)
            async with listening(self, self._places, loopback=self._loopback), self._watching_sleep():
                self._look()
                task_status.started()
                tasks.start_soon(self._write_down)
                await self._decide_until_stopped()
                with anyio.move_on_after(self.settings.drain_s + _STOP_WITHIN_S):
                    while self._node.state != "absent":
                        await self._news()
                await self._limit_watts()
            tasks.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def _watching_sleep(self) -> AsyncIterator[None]:
        watch, loop = self._sleep_watch, asyncio.get_running_loop()
        if watch is None:
            yield
            return

        def told(going: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._note_sleep, going)

        await anyio.to_thread.run_sync(watch.begin, told)
        try:
            yield
        finally:
            watch.end()

    def _note_sleep(self, going: bool) -> None:
        self._going_to_sleep = going
        self._look()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self._places.lock, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise WorkerRunsError(
                "a worker of yours runs already; `swarmkit worker status` tells what it does"
            ) from None
        try:
            yield
        finally:
            lock.release()

    async def _decide_until_stopped(self) -> None:
        while not self._stop.is_set():
            with anyio.move_on_after(_TICK_S):
                await self._news()
            self._look()
        self._node.want(None, "polite", self.settings.drain_s)
        self._tell_state()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed = anyio.Event()

    def _ring(self) -> None:
        self._changed.set()

    # ------------------------------------------------------------------ what the requests ask for

    def status(self) -> Status:
        """See `Controls.status`."""
        decision = self._decide() if self._decision is None else self._decision
        state, reason, words, until = self._state(decision)
        today = self._today()
        return Status(
            state=state,
            reason=reason,
            words=words,
            until=until,
            presence=decision.presence,
            pause=self._pause,
            allowance=decision.allowance,
            model=self.settings.serve.model,
            node=self._node_status(),
            lease=self._lease_status(),
            today=self._history.day(today),
            all=self._history.all(),
            month_bytes=self._month_bytes(),
            disk_bytes=self._disk_bytes,
            troubles=self._troubles(),
            notes=self._machine.notes + (self._session.notes if self._session else ()),
            restarts=self._node.failures,
            retry_at=self._node.retry_at,
            pid=os.getpid(),
            version=__version__,
        )

    def change_settings(self, changes: dict[str, Any]) -> WorkerSettings:
        """See `Controls.change_settings`."""
        settings = changed(self.settings, changes)
        save_settings(self._places.settings, settings)
        if self._current().reason in _AT_REST:
            self._sense_again()
        self.settings = settings
        self._trouble("settings", "")
        self.events.emit(WorkerSettingsChanged(**self._stamp()))
        self._look()
        return settings

    def pause(self, request: PauseRequest) -> None:
        """See `Controls.pause`."""
        if request.until == "away" and self.settings.rules.presence == "headless":
            raise UsageError("nobody sits at this computer by its settings, so name another end of the pause")
        self._set_pause(Pause.begin(request, self._local_now()))
        self._look()

    def resume(self) -> None:
        """See `Controls.resume`."""
        self._sense_again()
        self._set_pause(None)
        self._look()

    def stop(self) -> None:
        """See `Controls.stop`."""
        self._stop.set()
        self._ring()

    def skip_drain(self) -> None:
        """While it stops: wait for sessions no longer."""
        self._node.want(None, "now")

    def stats(self) -> Stats:
        """See `Controls.stats`."""
        today = self._today()
        return Stats(
            today=self._history.day(today),
            month=self._history.month(today),
            all=self._history.all(),
            month_bytes_limit=self._current().allowance.month_bytes,
        )

    def history(self, days: int) -> list[Day]:
        """See `Controls.history`."""
        return self._history.days(self._today(), days)

    def log(self, lines: int) -> list[str]:
        """See `Controls.log`."""
        return _last_lines(self._places.log, lines)

    def renew_lease(self, request: LeaseRequest) -> LeaseGranted:
        """See `Controls.renew_lease`."""
        held = self._valid_lease()
        if held is not None and held.request.holder != request.holder:
            raise ConflictError("another tray of yours runs already")
        now = self._clock.now()
        self._lease = lease = _Lease(request, now, now + LEASE_S)
        self._look()
        if self._is_lent or self._lease is not lease:
            return LeaseGranted(seconds=LEASE_S)
        self._lease = _Lease(request, now, now + IDLE_LEASE_S)
        return LeaseGranted(seconds=IDLE_LEASE_S)

    def release_lease(self, holder: str) -> None:
        """See `Controls.release_lease`."""
        if self._lease is not None and self._lease.request.holder == holder:
            self._lease = None
            self._look()

    def belongings(self) -> Belongings:
        """See `Controls.belongings`."""
        return belongings(self._places)

    async def events_as_lines(self) -> AsyncIterator[bytes]:
        """The status now, and everything that happens from now on, as lines of JSON."""
        with self.events.subscribe() as subscription:
            yield msgspec.json.encode({"event": "status", "status": self.status()}) + b"\n"
            following = aiter(subscription)
            while True:
                event: Event | None = None
                with anyio.move_on_after(_KEEP_ALIVE_S):
                    try:
                        event = await anext(following)
                    except StopAsyncIteration:
                        return
                yield b"\n" if event is None else msgspec.json.encode(event.to_json()) + b"\n"

    # ------------------------------------------------------------------ deciding

    def _look(self) -> None:
        """Decide anew, and do it."""
        self._after_jumps()
        if self._pause is not None and self._pause.is_over(self._clock.time(), self._away_s()):
            self._sense_again()
            self._set_pause(None)
        decision = self._decision = self._decide()
        self._measure(decision)
        if self._stop.is_set():
            return
        if decision.serves:
            self._shorten_lease()
        if decision.serves and self._sensed and (self._node.pid or not self._session_may_be_old()):
            self._node.want(self._wanted(decision))
        else:
            self._node.want(None, decision.haste, self.settings.drain_s)
        if self._going_to_sleep and self._sleep_watch is not None and self._node.state == "absent":
            self._sleep_watch.allow()
        self._tell_state()

    def _decide(self) -> Decision:
        reserve = self._quota_reserve()
        situation = Situation(
            now=self._local_now(),
            machine=msgspec.structs.replace(
                self._machine,
                month_bytes=self._month_bytes() + reserve,
                going_to_sleep=self._going_to_sleep,
            ),
            session=self._session,
            pause=self._pause,
            before=self._decision.reason if self._decision else None,
        )
        return decide(situation, self.settings)

    def _current(self) -> Decision:
        return self._decision or self._decide()

    def _wanted(self, decision: Decision) -> Wanted:
        allowance = decision.allowance
        away = self.settings.limits
        serve = self.settings.serve
        return Wanted(
            order=NodeOrder(
                serve=serve,
                # What a process has loaded cannot shrink when the person comes back and the node goes on: so
                # it is planned with the smaller of both limits, unless it ends then.
                ram_bytes=_least(away.ram_bytes, self.settings),
                gpu_memory_share=_least(away.gpu_memory_share, self.settings),
                disk_bytes=_least(away.disk_bytes, self.settings),
                weights=str(self._places.weights),
                identity=str(self._places.state / "identity.key"),
            ),
            runtime=Runtime(
                threads=allowance.cpu_cores,
                compute_share=round(self._governor.share, 2),
                upload_bytes_per_s=allowance.upload_bytes_per_s,
                download_bytes_per_s=allowance.download_bytes_per_s,
            ),
            cores=allowance.cpu_cores,
        )

    def _after_jumps(self) -> None:
        jump = self._watch.look()
        if jump.slept_s:
            logger.info("the computer has slept for %.0f s", jump.slept_s)
            self._lease = None  # what the tray told then is not true any more
            self._node.renew()  # its connections have ended, and its announcements too
        if jump.set_s:
            logger.info("the clock was set by %.0f s", jump.set_s)
            if self._pause is not None:
                self._set_pause(self._pause.after_clock_was_set(jump.set_s))

    @property
    def _session(self) -> SessionSignals | None:
        lease = self._valid_lease()
        return lease.request.signals if lease else None

    def _valid_lease(self) -> _Lease | None:
        return self._lease if self._lease and self._clock.now() < self._lease.until else None

    @property
    def _is_lent(self) -> bool:
        """Whether there is a node process, or is to be one."""
        return self._current().serves or self._node.state != "absent"

    def _shorten_lease(self) -> None:
        """From when this computer is lent, it is known within `LEASE_S` that the tray has gone."""
        lease, latest = self._lease, self._clock.now() + LEASE_S
        if lease is not None and lease.until > latest:
            self._lease = msgspec.structs.replace(lease, until=latest)

    def _session_may_be_old(self) -> bool:
        """Whether a tray told so long ago what it senses that nothing begins before it has told it anew.

        It does so at once when it hears that the node is to start.
        """
        lease = self._valid_lease()
        return lease is not None and self._clock.now() - lease.told_at > LEASE_S

    def _away_s(self) -> float | None:
        return seconds_away(self._session, self.settings)

    def _set_pause(self, pause: Pause | None) -> None:
        self._pause = pause
        try:
            if pause is None:
                self._places.pause.unlink(missing_ok=True)
            else:
                write_atomically(self._places.pause, msgspec.json.encode(pause))
            self._trouble("pause", "")
        except OSError as error:
            self._trouble("pause", f"The pause cannot be remembered beyond a restart: {error.strerror}.")

    def _read_pause(self) -> Pause | None:
        try:
            return msgspec.json.decode(self._places.pause.read_bytes(), type=Pause)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            # It is not known how long the person wanted to be left alone.
            self._trouble("pause", "The file with your pause cannot be read, so that the worker pauses.")
            return Pause(until="resumed")

    # ------------------------------------------------------------------ sensing and measuring

    async def _sense(self) -> None:
        while True:
            began = self._clock.now()
            lease = self._valid_lease()
            tray = lease.request.pid if lease else None
            order = SensingOrder(
                own=tuple(pid for pid in (os.getpid(), tray) if pid is not None),
                programs=self.settings.rules.programs,
                device=self.settings.serve.device,
                weights=self._places.weights,
            )
            self._machine = await anyio.to_thread.run_sync(self._sensing.sense, order)
            await self._limit_watts()
            self._sensed = True
            self._ring()
            period_s = _REST_PERIOD_S if self._current().reason in _AT_REST else _SENSE_PERIOD_S
            with anyio.move_on_after(max(0.1, period_s - (self._clock.now() - began))):
                await self._sense_now.wait()
            self._sense_now = anyio.Event()

    def _sense_again(self) -> None:
        """What was sensed may be old: nothing begins before it was sensed anew."""
        if self._current().reason in _AT_REST:
            self._sensed = False
        self._sense_now.set()

    async def _limit_watts(self) -> None:
        """Have the GPU keep to its power while the node runs; where that may not be set, it rests instead."""
        watts = self._current().allowance.gpu_watts if self._node.pid else None
        if watts != self._watts:
            self._watts = watts
            await anyio.to_thread.run_sync(self._sensing.limit_watts, watts)

    def _measure(self, decision: Decision) -> None:
        """What the node uses, and how much of the time it may compute."""
        now = self._clock.now()
        if now - self._governed_at >= _TICK_S or now < self._governed_at:
            gpu = self._machine.gpu
            heat = gpu.temperature_c if gpu else self._machine.temperature_c
            watts = gpu.watts if gpu else None
            seconds, self._governed_at = now - self._governed_at, now
            self._governor = self._governor.after(seconds, decision.allowance, heat, watts)
            self._note_usage(now, decision.allowance.ram_bytes)
        if not self._node.pid:
            self._governor = Governor(decision.allowance.compute_share)

    def _note_usage(self, now: float, most_ram: int) -> None:
        if not self._node.pid:
            self._used, self._cpu_cores, self._ram_bytes = None, 0.0, 0
            return
        used = used_by(self._node.pid)
        if self._used is not None and now > self._used[0]:
            self._cpu_cores = max(0.0, (used.cpu_s - self._used[1].cpu_s) / (now - self._used[0]))
        self._used, self._ram_bytes = (now, used), used.ram_bytes
        if used.ram_bytes > most_ram:
            self._node.fail(self._too_much(used.ram_bytes, most_ram))

    def _too_much(self, used: int, most: int) -> str:
        if self._node.state == "starting":
            # Before it could count what it needs: that is what any node takes.
            return f"{format_bytes(most)} is too little memory to serve anything; allow at least 1.0 GiB"
        return (
            f"the node used {format_bytes(used)} of memory, more than the {format_bytes(most)} that you "
            "allow, and was ended"
        )

    def _heard(self, word: FromNode) -> None:
        if not isinstance(word, NodeReport):
            self._ring()
            return
        now = self._clock.now()
        last = self._last_report
        before = last or NodeReport(sessions=0, sessions_begun=0, tokens=0, sent_bytes=0, received_bytes=0)
        passed = now - self._counted_at if last is not None else 0.0
        self._counted_at, self._last_report = now, word
        self._tokens.append((now, word.tokens))
        moved = word.sent_bytes + word.received_bytes - before.sent_bytes - before.received_bytes
        if passed > 0:
            self._bytes_per_s.append(moved / passed)
        self._history.add(
            Share(
                tokens=word.tokens - before.tokens,
                sessions=word.sessions_begun - before.sessions_begun,
                sent_bytes=word.sent_bytes - before.sent_bytes,
                received_bytes=word.received_bytes - before.received_bytes,
                serving_s=passed,
                working_s=passed if word.sessions else 0.0,
            ),
            self._clock.time(),
        )
        if (last is None) or bool(last.sessions) != bool(word.sessions) or self._quota_is_near():
            self._ring()

    def _node_changed(self) -> None:
        if self._node.state == "starting":
            self._last_report = None  # what a new process counts begins at zero
        self._ring()

    async def _write_down(self) -> None:
        while True:
            self._disk_bytes = await anyio.to_thread.run_sync(size_of, self._places.weights)
            await anyio.sleep(_WRITE_PERIOD_S)
            self._history.write(self._clock.time())

    def _quota_reserve(self) -> int:
        """Bytes that may go through until a node that is told to stop has stopped."""
        is_over = self._decision is not None and self._decision.reason == Reason.QUOTA
        if not self._node.pid and not is_over:
            return 0
        return int(max(_QUOTA_RESERVE_BYTES, _QUOTA_RESERVE_S * max(self._bytes_per_s, default=0.0)))

    def _quota_is_near(self) -> bool:
        most = self._current().allowance.month_bytes
        return most is not None and self._month_bytes() + self._quota_reserve() >= most

    def _month_bytes(self) -> int:
        month = self._history.month(self._today())
        return int(month.sent_bytes + month.received_bytes)

    # ------------------------------------------------------------------ what is shown

    def _state(self, decision: Decision) -> tuple[State, str, str, float | None]:
        node = self._node
        if self._stop.is_set():
            return "stopping", "stopping", "Stopping: sessions are moving away", None
        if not decision.serves:
            if node.state == "stopping":
                return "stopping", decision.reason.value, decision.words, decision.until
            return "paused", decision.reason.value, decision.words, decision.until
        if node.state == "failed":
            why = node.why or f"the node has ended by itself {_times(node.failures)}"
            words = f"Trouble: {why}; it is started again soon"
            return "trouble", "failed", words, node.retry_at
        if node.state == "serving":
            sessions = node.report.sessions if node.report else 0
            if sessions:
                plural = "session" if sessions == 1 else "sessions"
                return "working", Reason.SERVING.value, f"Working for {sessions} {plural}", None
            return "serving", Reason.SERVING.value, "Ready: nobody uses it at present", None
        progress = f": {node.progress}" if node.progress else ""
        return "starting", "starting", f"Starting{progress}", None

    def _tell_state(self) -> None:
        state, reason, words, until = self._state(self._current())
        if (state, words) != self._shown:
            self._shown = state, words
            logger.info("%s", words)
            event = WorkerStateChanged(state=state, reason=reason, words=words, until=until, **self._stamp())
            self.events.emit(event)

    def _troubles(self) -> tuple[str, ...]:
        found = [words for words in self._file_trouble.values() if words]
        if self._history.trouble:
            found.append(self._history.trouble)
        if self._node.failures:
            often = "" if self._node.failures < MANY_FAILURES else " Look into the log."
            wrote = f"It wrote last: {self._node.last_words[-600:] or 'nothing'}"
            why = f"{self._node.why[:1].upper()}{self._node.why[1:]}." if self._node.why else wrote
            found.append(f"The node has ended by itself {_times(self._node.failures)}. {why}{often}")
        return tuple(found)

    def _trouble(self, of: str, words: str) -> None:
        if words and self._file_trouble.get(of) != words:
            logger.warning("%s", words)
            self.events.emit(WorkerTrouble(words=words, **self._stamp()))
        self._file_trouble[of] = words

    def _node_status(self) -> NodeStatus | None:
        node = self._node
        if not node.pid:
            return None
        served, report = node.served_event, node.report
        return NodeStatus(
            pid=node.pid,
            blocks=(served["start"], served["stop"]) if served else None,
            peer_id=served.get("owner", {}).get("peer_id", ""),
            addresses=tuple(served.get("addresses", ())),
            progress=node.progress,
            sessions=report.sessions if report else 0,
            tokens_per_s=self._tokens_per_s(),
            cpu_cores=round(self._cpu_cores, 2),
            ram_bytes=self._ram_bytes,
            gpu_bytes=report.gpu_bytes if report else 0,
            compute_share=round(self._governor.share, 2),
        )

    def _tokens_per_s(self) -> float:
        if len(self._tokens) < 2:
            return 0.0
        (began, first), (ended, last) = self._tokens[0], self._tokens[-1]
        return max(0.0, (last - first) / (ended - began)) if ended > began else 0.0

    def _lease_status(self) -> LeaseStatus | None:
        lease = self._valid_lease()
        if lease is None:
            return None
        left_s = lease.until - self._clock.now()
        return LeaseStatus(holder=lease.request.holder, seconds=left_s, signals=lease.request.signals)

    def _stamp(self) -> dict[str, Any]:
        return {"time": self._clock.time(), "owner": Owner("worker", "")}

    def _local_now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time()).astimezone()

    def _today(self) -> date:
        return self._local_now().date()


def _last_lines(path: Path, count: int) -> list[str]:
    """The last lines of the log, of the file before it too if that one has just begun."""
    lines: deque[str] = deque(maxlen=count)
    for file in (path.with_name(f"{path.name}.1"), path):
        with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as text:
            lines.extend(line.rstrip("\n") for line in text)
    return list(lines)


def _least(limit: Any, settings: WorkerSettings) -> Any:
    """The smaller value of a limit, if the node goes on when the person comes back; else the one for away."""
    if settings.rules.presence == "headless" or settings.rules.only_when_away:
        return limit.away
    return min(limit.in_use, limit.away)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
