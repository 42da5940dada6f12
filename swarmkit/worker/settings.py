"""What the person has chosen: which model to serve, when, and within which limits.

All of it is one frozen value, `WorkerSettings`, kept as a JSON file that people can read and edit. Each limit
has one value for when the person uses the computer, and one for when they are away. Faces build their forms
from `settings_schema()`, which carries the descriptions and units given here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from swarmkit.errors import UsageError
from swarmkit.sizes import GIB
from swarmkit.worker.places import write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")

Share = Annotated[float, Meta(ge=0, le=1)]
Bytes = Annotated[int, Meta(ge=0, le=2**60)]
BytesPerSecond = Annotated[float, Meta(ge=1024, le=2**40)]
Hours = Annotated[str, Meta(pattern="^[#.]{24}$")]
"""One character for each hour of a day, from midnight on: `#` = may serve, `.` = may not."""
_ALL_DAY = "#" * 24
_LONGEST_LINK = 16_400
"""Letters of an invite link, which brings the key and the certificates of a private swarm."""
Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
DAYS: tuple[Weekday, ...] = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


class InUseOrAway(Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    """One limit: its value while the person uses the computer, and while they are away."""

    in_use: T
    away: T


def _both(value: T) -> InUseOrAway[T]:
    return InUseOrAway(value, value)


class Serve(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served, and in which swarm."""

    model: Annotated[
        str, Meta(max_length=512, description="`tiny-chat`, a folder, or a repository of the Hub.")
    ] = ""
    join: Annotated[
        tuple[Annotated[str, Meta(max_length=_LONGEST_LINK)], ...],
        Meta(
            max_length=64,
            description="Invite links, or addresses of peers of the swarm. None: begin a new swarm.",
        ),
    ] = ()
    swarm_key: Annotated[
        str, Meta(max_length=4096, description="The file with the key of a private swarm.")
    ] = ""
    device: Annotated[str, Meta(max_length=32, description="Where to compute: `cpu`, `cuda:0`, …")] = "cpu"
    dtype: Annotated[str, Meta(max_length=16, description="The precision; `auto` lets swarmkit choose.")] = (
        "auto"
    )
    num_blocks: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="How many blocks; none: as many as fit into the memory limit."),
    ] = None
    name: Annotated[str, Meta(max_length=64, description="How others see this computer.")] = ""
    host: Annotated[str, Meta(max_length=256, description="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="The port to listen on; 0: any.")] = 0
    announce: tuple[Annotated[str, Meta(max_length=512)], ...] = ()
    relay: Annotated[bool, Meta(description="Be reachable through other peers, behind a router.")] = False


class Rules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the worker may serve at all."""

    presence: Annotated[
        Literal["desktop", "headless"],
        Meta(
            description="`desktop`: a tray tells whether somebody uses the computer, and without it the "
            "worker pauses. `headless`: nobody ever sits here, and the `away` limits always hold."
        ),
    ] = "desktop"
    only_when_away: Annotated[bool, Meta(description="Serve only while nobody uses the computer.")] = True
    away_after_s: Annotated[
        float, Meta(ge=0, le=86400, description="Seconds without any input until you count as away.")
    ] = 300.0
    on_battery: Annotated[bool, Meta(description="Serve while the computer runs on its battery.")] = False
    on_metered: Annotated[bool, Meta(description="Serve over a connection that costs by the byte.")] = False
    pause_for_full_screen: Annotated[bool, Meta(description="Pause while a program fills the screen.")] = True
    pause_for_film: Annotated[bool, Meta(description="Pause while a film or music plays.")] = True
    pause_for_remote_session: Annotated[bool, Meta(description="Pause while somebody is here remotely.")] = (
        True
    )
    pause_for_gpu_programs: Annotated[
        bool, Meta(description="Pause while another program uses the GPU that the worker uses.")
    ] = True
    programs: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(max_length=256, description="Names of programs; the worker pauses while one of them runs."),
    ] = ()
    busy_cpu: Annotated[
        InUseOrAway[Share],
        Meta(description="Pause while other programs use more than this share of all processors."),
    ] = InUseOrAway(0.25, 0.5)
    busy_gpu: Annotated[
        InUseOrAway[Share], Meta(description="Pause while other programs use more than this of the GPU.")
    ] = InUseOrAway(0.1, 0.25)
    schedule: Annotated[
        dict[Weekday, Hours],
        Meta(description="For each day 24 characters, one an hour: `#` may serve, `.` may not."),
    ] = msgspec.field(default_factory=lambda: dict.fromkeys(DAYS, _ALL_DAY))


class WorkerLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that the worker uses. `None` sets no limit."""

    cpu_cores: Annotated[
        InUseOrAway[Annotated[int, Meta(ge=1, le=4096)] | None], Meta(description="Processor cores.")
    ] = InUseOrAway(1, None)
    compute_share: Annotated[
        InUseOrAway[Annotated[float, Meta(ge=0.05, le=1)]],
        Meta(description="The share of time during which the device computes."),
    ] = InUseOrAway(1.0, 1.0)
    ram_bytes: Annotated[
        InUseOrAway[Annotated[int, Meta(ge=256 * 2**20)]],
        Meta(description="Memory of the computer, in bytes."),
    ] = InUseOrAway(4 * GIB, 8 * GIB)
    disk_bytes: Annotated[InUseOrAway[Bytes], Meta(description="Disk for weights, in bytes.")] = _both(
        20 * GIB
    )
    disk_free_bytes: Annotated[
        InUseOrAway[Bytes], Meta(description="Bytes of the disk that always stay free.")
    ] = _both(2 * GIB)
    upload_bytes_per_s: Annotated[
        InUseOrAway[BytesPerSecond | None], Meta(description="Upload, in bytes per second.")
    ] = _both(625_000.0)
    download_bytes_per_s: Annotated[
        InUseOrAway[BytesPerSecond | None], Meta(description="Download, in bytes per second.")
    ] = InUseOrAway(1_250_000.0, None)
    month_bytes: Annotated[
        InUseOrAway[Bytes | None], Meta(description="Upload and download together in a month, in bytes.")
    ] = _both(50 * 10**9)
    gpu_memory_share: Annotated[InUseOrAway[Share], Meta(description="The share of the GPU's memory.")] = (
        InUseOrAway(0.5, 0.8)
    )
    gpu_watts: Annotated[
        InUseOrAway[Annotated[float, Meta(ge=1)] | None],
        Meta(description="The GPU's power in watts. Where it may not be set, the GPU rests between steps."),
    ] = _both(None)
    temperature_c: Annotated[
        InUseOrAway[Annotated[float, Meta(ge=30, le=110)]],
        Meta(description="The highest temperature, in °C. Near it the device rests between steps."),
    ] = InUseOrAway(70.0, 75.0)


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the person has chosen. A new one serves nothing: `agreed` is false."""

    agreed: Annotated[
        bool, Meta(description="Whether you have chosen to lend this computer. Until then nothing runs.")
    ] = False
    serve: Serve = Serve()
    rules: Rules = msgspec.field(default_factory=Rules)
    limits: WorkerLimits = WorkerLimits()
    drain_s: Annotated[
        float, Meta(ge=0, le=600, description="Seconds for sessions to move away where nothing is urgent.")
    ] = 30.0
    history_days: Annotated[
        int, Meta(ge=31, le=36500, description="For how many days contributions are remembered.")
    ] = 730


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and a sentence for the person where the file was unusable (else empty)."""

    settings: WorkerSettings
    trouble: str = ""


def load_settings(path: Path) -> LoadedSettings:
    """Read the settings. An unusable file is kept aside, and the defaults are used."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return LoadedSettings(WorkerSettings())
    except OSError as error:
        return LoadedSettings(
            WorkerSettings(),
            f"The settings in {path} cannot be read ({error.strerror}). The defaults are used, with which "
            "nothing is served.",
        )
    try:
        return LoadedSettings(decode_settings(data))
    except UsageError as error:
        aside = path.with_name(f"{path.name}.unusable")
        try:
            path.replace(aside)
            kept = f"The file was kept as {aside}"
        except OSError:
            kept = f"The file is still {path}"
        return LoadedSettings(
            WorkerSettings(),
            f"The settings could not be used: {error} {kept}, and the defaults are used, with which nothing "
            "is served until you choose again.",
        )


def decode_settings(data: bytes) -> WorkerSettings:
    """Read settings from JSON.

    Raises:
        UsageError: the text is no JSON, or a value is not allowed; the message names it.
    """
    try:
        return _checked(msgspec.json.decode(data))
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{error}.") from error


def save_settings(path: Path, settings: WorkerSettings) -> None:
    """Write the settings; a crash leaves either the old or the new ones.

    Raises:
        OSError: they cannot be written.
    """
    write_atomically(path, msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")


def changed(settings: WorkerSettings, changes: Mapping[str, Any]) -> WorkerSettings:
    """Return settings with some values replaced: a JSON merge patch (RFC 7396), in which null is a value.

    Raises:
        UsageError: a name or a value is not allowed; the message says which.
    """
    return _checked(_merged(msgspec.to_builtins(settings), changes))


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the settings, with a description, bounds and default of each value."""
    return msgspec.json.schema(WorkerSettings)


def _checked(values: Any) -> WorkerSettings:
    try:
        settings = msgspec.convert(values, WorkerSettings)
    except msgspec.ValidationError as error:
        raise UsageError(f"{error}.") from error
    if set(settings.rules.schedule) != set(DAYS):
        raise UsageError("Object must name all seven days - at `$.rules.schedule`.")
    return settings


def _merged(values: Any, changes: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(changes, Mapping):
        return changes
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merged(values[name], change) if name in values else change
    return merged
