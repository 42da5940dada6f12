"""May the worker serve now, within which limits, and why? One pure function from signals and settings.

The rules are asked in the order in which they stand in `_RULES`, and the first that objects is the reason
that the person sees. A signal that is not known never counts as "nobody is here". Where a signal cannot be
had on a system at all (a full-screen program under Wayland, for example), its rule cannot object; the notes
of the signals, which every face shows, say which these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from enum import Enum
from typing import Literal, TypeVar

from msgspec import Struct

from swarmkit.sizes import format_data
from swarmkit.worker.pause import UNTIL_AWAY_S, Haste, Pause
from swarmkit.worker.settings import DAYS, InUseOrAway, WorkerLimits, WorkerSettings
from swarmkit.worker.signals import MachineSignals, SessionSignals

T = TypeVar("T")

Presence = Literal["in use", "away", "unknown"]
_HYSTERESIS = 0.8
"""A pause for load ends when the load is below this part of its limit, lest it begin and end all the time."""


class Reason(str, Enum):
    """Why the worker is in its state. Every face, the log and the tests use these."""

    SERVING = "serving"
    NOT_AGREED = "not_agreed"
    NO_MODEL = "no_model"
    ASKED = "asked"
    SLEEP = "sleep"
    NO_TRAY = "no_tray"
    REMOTE_SESSION = "remote_session"
    PRESENCE_UNKNOWN = "presence_unknown"
    IN_USE = "in_use"
    BATTERY = "battery"
    METERED = "metered"
    OFFLINE = "offline"
    SCHEDULE = "schedule"
    QUOTA = "quota"
    PROGRAM = "program"
    FULL_SCREEN = "full_screen"
    FILM = "film"
    GPU_PROGRAM = "gpu_program"
    BUSY_CPU = "busy_cpu"
    BUSY_GPU = "busy_gpu"
    TOO_HOT = "too_hot"
    DISK = "disk"


class Allowance(Struct, frozen=True, kw_only=True):
    """The limits that hold now, chosen from `WorkerLimits` by whether somebody uses the computer."""

    cpu_cores: int | None
    compute_share: float
    ram_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    upload_bytes_per_s: float | None
    download_bytes_per_s: float | None
    month_bytes: int | None
    gpu_memory_share: float
    gpu_watts: float | None
    temperature_c: float


class Situation(Struct, frozen=True, kw_only=True):
    """Everything that a decision depends on, besides the settings.

    Attributes:
        now: with the computer's time zone.
        session: what the tray told last; None without a tray whose lease holds.
        away_s: for how long nobody has used the computer; None: it is not known. Where the tray's lease has
            just begun, this is what it told, however long it was gone.
        before: the reason that held until now.
    """

    now: datetime
    machine: MachineSignals
    session: SessionSignals | None = None
    pause: Pause | None = None
    before: Reason | None = None


class Decision(Struct, frozen=True, kw_only=True):
    """What the worker shall do.

    Attributes:
        serves: whether a node process may exist.
        reason: why, for programs; `words`: for people, such as "Paused: on battery".
        until: Unix time at which this changes by itself, as far as that is known.
        haste: how soon the node has gone, where it may not serve.
        presence: whether somebody uses the computer.
        allowance: the limits that hold.
    """

    serves: bool
    reason: Reason
    words: str
    presence: Presence
    allowance: Allowance
    until: float | None = None
    haste: Haste = "prompt"


class _Objection(Struct, frozen=True):
    reason: Reason
    words: str
    until: datetime | None = None
    haste: Haste = "prompt"


class _Case(Struct, frozen=True):
    """What the rules look at."""

    situation: Situation
    settings: WorkerSettings
    presence: Presence
    away_s: float | None
    allowance: Allowance

    @property
    def machine(self) -> MachineSignals:
        return self.situation.machine

    @property
    def is_headless(self) -> bool:
        return self.settings.rules.presence == "headless"

    def of(self, limit: InUseOrAway[T]) -> T:
        return limit.away if self.presence == "away" else limit.in_use

    def held_before(self, reason: Reason) -> bool:
        return self.situation.before == reason


def decide(situation: Situation, settings: WorkerSettings) -> Decision:
    """Return whether the worker may serve now, within which limits, and why."""
    away_s = seconds_away(situation.session, settings)
    presence = _presence(away_s, settings)
    allowance = allowed(settings.limits, presence)
    case = _Case(situation, settings, presence, away_s, allowance)
    objection = next(_objections(case), None)
    if objection is None:
        return Decision(
            serves=True, reason=Reason.SERVING, words="Serving", presence=presence, allowance=allowance
        )
    return Decision(
        serves=False,
        reason=objection.reason,
        words=f"Paused: {objection.words}",
        until=objection.until.timestamp() if objection.until else None,
        haste=objection.haste,
        presence=presence,
        allowance=allowance,
    )


def seconds_away(session: SessionSignals | None, settings: WorkerSettings) -> float | None:
    """For how long nobody has used the computer; None: it is not known."""
    if settings.rules.presence == "headless":
        return float("inf")
    if session is None:
        return None
    if session.locked and not session.remote_session:
        # A locked screen is as good as an absence that has lasted long enough.
        return max(session.idle_s or 0.0, settings.rules.away_after_s)
    return session.idle_s


def allowed(limits: WorkerLimits, presence: Presence) -> Allowance:
    """Return the limits that hold. Unless the person is known to be away, they are those of `in_use`."""
    values = {name: getattr(limits, name) for name in WorkerLimits.__struct_fields__}
    side = "away" if presence == "away" else "in_use"
    return Allowance(**{name: getattr(value, side) for name, value in values.items()})


def _presence(away_s: float | None, settings: WorkerSettings) -> Presence:
    if away_s is None:
        return "unknown"
    return "away" if away_s >= settings.rules.away_after_s else "in use"


def _objections(case: _Case) -> Iterator[_Objection]:
    for rule in _RULES:
        objection = rule(case)
        if objection is not None:
            yield objection


# ---------------------------------------------------------------------- the rules, in their order


def _chosen(case: _Case) -> _Objection | None:
    if not case.settings.agreed:
        return _Objection(Reason.NOT_AGREED, "you have not chosen yet to lend this computer")
    if not case.settings.serve.model:
        return _Objection(Reason.NO_MODEL, "no model has been chosen yet")
    return None


def _asked(case: _Case) -> _Objection | None:
    pause = case.situation.pause
    if pause is None:
        return None
    if pause.until == "away":
        minutes = round(UNTIL_AWAY_S / 60)
        return _Objection(Reason.ASKED, f"until you have been away for {minutes} minutes", None, pause.haste)
    if pause.ends_at is None:
        return _Objection(Reason.ASKED, "until you resume", None, pause.haste)
    ends = datetime.fromtimestamp(pause.ends_at, case.situation.now.tzinfo)
    return _Objection(Reason.ASKED, f"until {_moment(ends, case.situation.now)}", ends, pause.haste)


def _asleep(case: _Case) -> _Objection | None:
    if case.machine.going_to_sleep:
        return _Objection(Reason.SLEEP, "the computer goes to sleep")
    return None


def _battery(case: _Case) -> _Objection | None:
    if case.machine.on_battery and not case.settings.rules.on_battery:
        return _Objection(Reason.BATTERY, "on battery")
    return None


def _metered(case: _Case) -> _Objection | None:
    if case.machine.metered and not case.settings.rules.on_metered:
        return _Objection(Reason.METERED, "the connection is metered")
    return None


def _quota(case: _Case) -> _Objection | None:
    used, most = case.machine.month_bytes, case.allowance.month_bytes
    if used is None or most is None or used < most:
        return None
    first = next_month(case.situation.now)
    words = f"this month's {format_data(most)} are used up; goes on on {first.day} {first:%B}"
    return _Objection(Reason.QUOTA, words, first)


def _schedule(case: _Case) -> _Objection | None:
    schedule, now = case.settings.rules.schedule, case.situation.now
    if schedule[DAYS[now.weekday()]][now.hour] == "#":
        return None
    hour = now.replace(minute=0, second=0, microsecond=0)
    for _ in range(7 * 24):
        hour += timedelta(hours=1)
        if schedule[DAYS[hour.weekday()]][hour.hour] == "#":
            return _Objection(
                Reason.SCHEDULE, f"by your schedule, until {_moment(hour, now)}", hour, "polite"
            )
    return _Objection(Reason.SCHEDULE, "your schedule has no hours to serve", None, "polite")


def _tray(case: _Case) -> _Objection | None:
    if case.situation.session is None and not case.is_headless:
        return _Objection(Reason.NO_TRAY, "the tray does not run, which tells when you are away")
    return None


def _remote(case: _Case) -> _Objection | None:
    session = case.situation.session
    if session is not None and session.remote_session and case.settings.rules.pause_for_remote_session:
        return _Objection(Reason.REMOTE_SESSION, "somebody is here over the network")
    return None


def _program(case: _Case) -> _Objection | None:
    if case.machine.program:
        return _Objection(Reason.PROGRAM, f"{case.machine.program} runs")
    return None


def _full_screen(case: _Case) -> _Objection | None:
    session = case.situation.session
    if session is not None and session.full_screen and case.settings.rules.pause_for_full_screen:
        return _Objection(Reason.FULL_SCREEN, f"{session.full_screen} fills the screen")
    return None


def _film(case: _Case) -> _Objection | None:
    session = case.situation.session
    if session is not None and session.film and case.settings.rules.pause_for_film:
        return _Objection(Reason.FILM, f"{session.film} plays")
    return None


def _in_use(case: _Case) -> _Objection | None:
    rules = case.settings.rules
    if not rules.only_when_away or case.presence == "away":
        return None
    if case.away_s is None:
        return _Objection(Reason.PRESENCE_UNKNOWN, "it cannot be told whether you are away")
    left_s = rules.away_after_s - case.away_s
    words = f"you use the computer ({_so_far(case.away_s, rules.away_after_s)})"
    return _Objection(Reason.IN_USE, words, case.situation.now + timedelta(seconds=left_s))


def _gpu_program(case: _Case) -> _Objection | None:
    gpu = case.machine.gpu
    if gpu is not None and gpu.other_programs and case.settings.rules.pause_for_gpu_programs:
        return _Objection(Reason.GPU_PROGRAM, f"{gpu.other_programs[0]} uses the GPU")
    return None


def _busy(case: _Case) -> _Objection | None:
    rules, machine = case.settings.rules, case.machine
    gpu = machine.gpu.other_load if machine.gpu is not None else None
    for reason, load, limit, what in (
        (Reason.BUSY_CPU, machine.other_cpu, case.of(rules.busy_cpu), "processors"),
        (Reason.BUSY_GPU, gpu, case.of(rules.busy_gpu), "GPU"),
    ):
        most = limit * (_HYSTERESIS if case.held_before(reason) else 1.0)
        if load is not None and load > most:
            return _Objection(reason, f"other programs use {load:.0%} of the {what}")
    return None


def _heat(case: _Case) -> _Objection | None:
    """The governor keeps the device below its limit. What is hotter all the same is left alone to cool."""
    gpu, limit = case.machine.gpu, case.allowance.temperature_c
    heat = gpu.temperature_c if gpu is not None else case.machine.temperature_c
    most = limit - 5.0 if case.held_before(Reason.TOO_HOT) else limit + 5.0
    if heat is not None and heat > most:
        return _Objection(Reason.TOO_HOT, f"the device has {heat:.0f} °C, and cools down")
    return None


def _disk(case: _Case) -> _Objection | None:
    free, least = case.machine.disk_free_bytes, case.allowance.disk_free_bytes
    if free is not None and free < least:
        return _Objection(Reason.DISK, f"only {format_data(free)} of the disk are free")
    return None


def _offline(case: _Case) -> _Objection | None:
    if case.machine.online is False and case.settings.serve.join:
        return _Objection(Reason.OFFLINE, "there is no network")
    return None


_RULES: tuple[Callable[[_Case], _Objection | None], ...] = (
    _chosen,
    _asked,
    _asleep,
    _battery,
    _metered,
    _quota,
    _schedule,
    _tray,
    _remote,
    _program,
    _full_screen,
    _film,
    _in_use,
    _gpu_program,
    _busy,
    _heat,
    _disk,
    _offline,
)


# ---------------------------------------------------------------------- words


def next_month(now: datetime) -> datetime:
    """Return the first moment of the next month."""
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


def _moment(then: datetime, now: datetime) -> str:
    days = (then.date() - now.date()).days
    if days == 0:
        return f"{then:%H:%M}"
    if days == 1:
        return f"{then:%H:%M} tomorrow"
    return f"{then:%A} {then:%H:%M}" if days < 7 else f"{then:%d %B}".lstrip("0")


def _so_far(passed_s: float, of_s: float) -> str:
    """In minutes, where that is not too coarse: whatever shows it is drawn anew with each change."""
    if of_s < 120:
        return f"{int(passed_s)} of {int(of_s)} s"
    return f"{int(passed_s // 60)} of {int(of_s // 60)} min"
