"""The worker starts, stops and restarts its node process as the policy and the person want."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import UsageError
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.main import log_to
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.restarts import pause_before_restart
from swarmkit.worker.settings import WorkerSettings, changed, save_settings
from swarmkit.worker.worker import IDLE_LEASE_S, LEASE_S, WorkerRunsError
from tests.disks import small_disk
from tests.waiting import wait_until
from tests.worker.worlds import AWAY, HERE, RunningWorker, SaidMachine

ROOT = Path(__file__).parents[2]
Start = Callable[..., RunningWorker]


class SetClock:
    """The computer's clock, which a test may set, or let pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        self.set_s = 0.0

    def now(self) -> float:
        return SYSTEM_CLOCK.now() + self.passed_s

    def time(self) -> float:
        return SYSTEM_CLOCK.time() + self.passed_s + self.set_s


def node_of(worker: RunningWorker) -> psutil.Process:
    node = worker.status().node
    assert node is not None
    return psutil.Process(node.pid)


def chosen(places: WorkerPlaces, **changes: object) -> None:
    """As if the person had chosen before the worker started."""
    agreed = {"agreed": True, "serve": {"model": "quick"}, **changes}
    save_settings(places.settings, changed(WorkerSettings(), agreed))


# serving and pausing


def test_it_serves_when_the_person_has_chosen_and_is_away(worker: RunningWorker) -> None:
    worker.client.renew_lease("tray", AWAY)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    assert worker.wait_for("working").words == "Working for 1 session"


def test_an_installed_worker_that_was_never_asked_starts_nothing(worker: RunningWorker) -> None:
    worker.client.renew_lease("tray", AWAY)
    assert worker.status().node is None


def test_a_pause_ends_the_process(worker: RunningWorker) -> None:
    worker.serve()
    worker.wait_for("working")
    node = node_of(worker)
    worker.client.pause()
    worker.wait_for("paused")
    assert not node.is_running()


@pytest.mark.parametrize("haste", ["prompt", "now"])
def test_a_node_that_does_not_listen_is_killed(worker: RunningWorker, haste: str) -> None:
    worker.serve("stubborn")
    worker.wait_for("working")
    node = node_of(worker)
    worker.client.pause(haste=haste)  # type: ignore[arg-type]
    worker.wait_for("paused")
    assert not node.is_running()


def test_haste_may_grow_while_it_is_polite(worker: RunningWorker) -> None:
    worker.serve("stubborn", drain_s=600.0)
    worker.wait_for("working")
    worker.client.pause(haste="polite")
    assert worker.status().state == "stopping"
    worker.client.pause(haste="now")
    worker.wait_for("paused")


def test_the_person_coming_back_ends_it(worker: RunningWorker) -> None:
    worker.client.renew_lease("tray", AWAY)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.wait_for("working")
    worker.client.renew_lease("tray", HERE)
    assert worker.wait_for("paused").reason == "in_use"


def test_a_tray_that_is_killed_leaves_no_node_behind(start: Start) -> None:
    clock = SetClock()
    worker = start(clock=clock)
    worker.client.renew_lease("tray", AWAY)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.wait_for("working")
    clock.passed_s += LEASE_S
    assert worker.wait_for("paused").reason == "no_tray"


def test_the_battery_ends_it_and_the_mains_bring_it_back(worker: RunningWorker, machine: SaidMachine) -> None:
    worker.serve()
    worker.wait_for("working")
    machine.say(on_battery=True)
    assert worker.wait_for("paused").words == "Paused: on battery"
    machine.say(on_battery=False)
    worker.wait_for("working")


def test_what_it_senses_leaves_out_itself_and_the_tray(worker: RunningWorker, machine: SaidMachine) -> None:
    worker.client.renew_lease("tray", AWAY)
    worker.serve()
    wait_until(lambda: machine.orders and len(machine.orders[-1].own) == 2, "both are ours", every=0.05)
    assert machine.orders[-1].own[0] == os.getpid()


def test_limits_reach_a_node_that_runs(worker: RunningWorker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "swarmkit.worker.node_supervisor")
    worker.serve()
    worker.wait_for("working")
    node = node_of(worker)
    worker.client.change_settings({"limits": {"upload_bytes_per_s": {"away": 77_000.0}}})
    wait_until(lambda: any("77000" in line for line in caplog.messages), "it was told")
    assert node.is_running()


def test_another_model_takes_another_process(worker: RunningWorker) -> None:
    worker.serve()
    worker.wait_for("working")
    before = node_of(worker).pid
    worker.client.change_settings({"serve": {"model": "another"}})
    worker.wait_until(lambda status: status.node and status.node.pid != before, "another process")


# limits


def test_a_node_that_takes_too_much_memory_is_ended_and_the_person_told(worker: RunningWorker) -> None:
    least = 256 * 2**20
    limits = {"ram_bytes": {"in_use": least, "away": least}}
    worker.serve("greedy-for-memory", limits=limits)
    status = worker.wait_for("trouble")
    assert "more than the 256.0 MiB that you allow" in status.troubles[0]


def test_it_stops_before_the_months_quota_is_used_up(worker: RunningWorker) -> None:
    most = 700_000_000
    limits = {
        "month_bytes": {"in_use": most, "away": most},
        "upload_bytes_per_s": {"in_use": 1e8, "away": 1e8},
        "download_bytes_per_s": {"in_use": 1e8, "away": 1e8},
    }
    worker.serve("greedy-for-traffic", limits=limits)
    worker.wait_until(lambda status: status.reason == "quota", "the quota is used up")
    worker.wait_for("paused")
    assert worker.status().month_bytes <= most


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes")
def test_its_processes_run_on_so_many_cores(worker: RunningWorker) -> None:
    worker.serve(limits={"cpu_cores": {"in_use": 1, "away": 1}})
    worker.wait_for("working")
    assert len(os.sched_getaffinity(node_of(worker).pid)) == 1


def test_the_gpus_power_is_limited_while_the_node_runs_and_no_longer(
    worker: RunningWorker, machine: SaidMachine
) -> None:
    worker.serve(limits={"gpu_watts": {"in_use": 100.0, "away": 150.0}})
    wait_until(lambda: machine.watts == 150.0, "the limit is set")
    worker.client.pause()
    wait_until(lambda: machine.watts is None, "the usual one is put back")


# faults


def test_a_node_that_fails_is_started_again_and_its_words_are_kept(worker: RunningWorker) -> None:
    worker.serve("failing")
    status = worker.wait_for("trouble")
    assert "the pretended model cannot be had" in status.troubles[0]
    worker.wait_until(lambda status: status.restarts > 1, "it was started again")


def test_what_a_person_can_mend_is_the_reason_also_while_it_is_tried_again(worker: RunningWorker) -> None:
    worker.serve("too-large")
    words = "too little memory to serve too-large; allow at least 1.5 GiB"
    assert words in worker.wait_for("trouble").words
    (told,) = worker.wait_for("starting").troubles
    assert (words in told, "Traceback" in told) == (True, False)


def test_another_choice_does_not_wait_for_what_has_failed(worker: RunningWorker) -> None:
    worker.serve("failing")
    worker.wait_for("trouble")
    worker.client.change_settings({"serve": {"model": "quick"}})
    status = worker.wait_for("working")
    assert (status.restarts, status.troubles) == (0, ())


def test_a_node_that_is_killed_is_started_again(worker: RunningWorker) -> None:
    worker.serve()
    worker.wait_for("working")
    first = node_of(worker)
    first.kill()
    worker.wait_until(lambda status: status.node and status.node.pid != first.pid, "another process")


def test_the_pauses_between_restarts_grow_and_end() -> None:
    assert [pause_before_restart(n) for n in (1, 2, 3, 9, 10, 1000)] == [2, 4, 8, 512, 600, 600]


def test_a_failed_start_does_not_survive_the_persons_pause(worker: RunningWorker) -> None:
    worker.serve("failing")
    worker.wait_for("trouble")
    worker.client.pause()
    assert (worker.status().state, worker.status().troubles) == ("paused", ())


def test_only_one_worker_of_a_person_runs(worker: RunningWorker, machine: SaidMachine) -> None:
    with pytest.raises(WorkerRunsError, match="runs already"):
        RunningWorker(worker.places, machine)
    assert worker.status().state == "paused"


def test_settings_that_are_broken_are_kept_aside_and_the_person_is_told(
    places: WorkerPlaces, start: Start
) -> None:
    places.make()
    places.settings.write_bytes(b"{broken")
    status = start().status()
    assert (status.state, "worker.json.unusable" in status.troubles[0]) == ("paused", True)


def test_a_broken_history_is_kept_aside(places: WorkerPlaces, start: Start) -> None:
    places.make()
    places.history.write_bytes(b"no database" * 1000)
    worker = start()
    assert places.history.with_name("contributions.sqlite.unusable").exists()
    assert "history" in worker.status().troubles[0]


def test_a_full_disk_is_told_and_the_pause_holds_all_the_same(
    worker: RunningWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.serve()
    worker.wait_for("working")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swarmkit.worker.worker.write_atomically", full)
    worker.client.pause()
    status: Status = worker.wait_for("paused")
    assert "No space left on device" in status.troubles[0]


def test_settings_that_cannot_be_written_do_not_hold(
    worker: RunningWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "worker.json")

    monkeypatch.setattr("swarmkit.worker.worker.save_settings", full)
    with pytest.raises(UsageError, match=r"worker.json: No space left on device"):
        worker.client.change_settings({"agreed": True})
    assert not worker.client.settings().agreed


@pytest.mark.slow
def test_on_a_disk_without_a_free_byte_the_person_is_obeyed_and_told(
    tmp_path: Path, machine: SaidMachine
) -> None:
    """A real disk, which has room again later."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        worker = RunningWorker(WorkerPlaces.inside(disk.path / "home"), machine)
        worker.serve()
        worker.wait_for("working")
        disk.fill()
        worker.client.pause()
        status = worker.wait_for("paused")
        assert "No space left on device" in " ".join(status.troubles)
        with pytest.raises(UsageError, match="No space left on device"):
            worker.client.change_settings({"agreed": False})
        assert worker.client.settings().agreed
        disk.clear()
        worker.client.pause("tomorrow")
        assert worker.status().troubles == ()
        worker.close()


def test_nobody_can_be_away_from_where_nobody_sits(worker: RunningWorker) -> None:
    worker.serve()
    with pytest.raises(UsageError, match="another end"):
        worker.client.pause("away")


def test_a_pause_outlives_the_worker(places: WorkerPlaces, start: Start) -> None:
    first = start()
    first.client.pause("seconds", 3600.0)
    first.close()
    assert start().status().pause is not None


def test_a_pause_that_cannot_be_read_counts_as_a_pause(places: WorkerPlaces, start: Start) -> None:
    places.make()
    chosen(places, rules={"presence": "headless"})
    places.pause.write_bytes(b"\x00")
    assert start().status().reason == "asked"


def test_a_clock_that_is_set_changes_no_pauses_length(start: Start) -> None:
    clock = SetClock()
    worker = start(clock=clock)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.client.pause("seconds", 3600.0)
    clock.set_s = 86400.0

    def left_s(status: Status) -> float:
        return (status.pause.ends_at or 0.0) - clock.time() if status.pause else 0.0

    worker.wait_until(lambda status: 3500 < left_s(status) <= 3600, "an hour is left by the new date")


def test_a_pause_for_an_hour_ends_after_an_hour(start: Start) -> None:
    clock = SetClock()
    worker = start(clock=clock)
    worker.serve()
    worker.client.pause("seconds", 3600.0)
    clock.passed_s += 3600.0
    worker.wait_for("working")


def test_after_a_sleep_the_node_is_another_one(start: Start) -> None:
    clock = SetClock()
    worker = start(clock=clock)
    worker.serve()
    worker.wait_for("working")
    before = node_of(worker).pid
    clock.passed_s += 3600.0
    worker.wait_until(lambda status: status.node and status.node.pid != before, "another process")


def test_after_a_sleep_what_the_tray_said_is_not_believed(start: Start) -> None:
    clock = SetClock()
    worker = start(clock=clock)
    worker.client.renew_lease("tray", AWAY)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.wait_for("working")
    clock.passed_s += 3600.0
    assert worker.wait_for("paused").reason == "no_tray"


class SaidSleep:
    """A sleep that begins when the test says so."""

    allowed = False

    def begin(self, on_change: Callable[[bool], None]) -> None:
        self.tell = on_change

    def allow(self) -> None:
        self.allowed = True

    def end(self) -> None:
        pass


def test_when_the_computer_goes_to_sleep_the_node_leaves_first(start: Start) -> None:
    sleep = SaidSleep()
    worker = start(sleep_watch=sleep)
    worker.serve()
    worker.wait_for("working")
    assert not sleep.allowed
    sleep.tell(True)
    assert worker.wait_for("paused").reason == "sleep"
    wait_until(lambda: sleep.allowed, "the computer may sleep")


def test_without_a_network_it_waits_for_one(worker: RunningWorker, machine: SaidMachine) -> None:
    worker.serve()
    worker.wait_for("working")
    worker.client.change_settings({"serve": {"join": ["/ip4/192.0.2.7/tcp/1/p2p/x"]}})
    machine.say(online=False)
    assert worker.wait_for("paused").reason == "offline"
    machine.say(online=True)
    worker.wait_for("working")


# leases


def seconds_left(worker: RunningWorker) -> float:
    lease = worker.status().lease
    assert lease is not None
    return lease.seconds


def test_a_tray_renews_seldom_while_nothing_is_lent(worker: RunningWorker) -> None:
    assert worker.client.renew_lease("tray", AWAY).seconds == IDLE_LEASE_S
    assert seconds_left(worker) > LEASE_S


def test_a_tray_renews_often_while_a_node_runs(worker: RunningWorker) -> None:
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.client.renew_lease("tray", AWAY)
    worker.wait_for("working")
    assert worker.client.renew_lease("tray", AWAY).seconds == LEASE_S
    assert seconds_left(worker) <= LEASE_S


def test_a_long_lease_is_shortened_when_a_node_starts(worker: RunningWorker) -> None:
    worker.client.renew_lease("tray", AWAY)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.wait_for("starting", "working")
    assert seconds_left(worker) <= LEASE_S


@pytest.fixture
def told_long_ago(start: Start) -> tuple[RunningWorker, SetClock]:
    """A worker that is to serve, and knows of this person only what a tray told some time ago; its clock."""
    clock = SetClock()
    worker = start(clock=clock)
    worker.client.renew_lease("tray", AWAY)
    clock.passed_s += LEASE_S + 1.0
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    return worker, clock


def test_no_node_starts_by_what_a_tray_told_long_ago(told_long_ago: tuple[RunningWorker, SetClock]) -> None:
    worker, _ = told_long_ago
    assert (worker.wait_for("starting").node, worker.status().node) == (None, None)
    worker.client.renew_lease("tray", HERE)
    assert (worker.status().reason, worker.status().node) == ("in_use", None)


def test_a_node_starts_when_the_tray_has_told_anew(told_long_ago: tuple[RunningWorker, SetClock]) -> None:
    worker, _ = told_long_ago
    worker.wait_for("starting")
    worker.client.renew_lease("tray", AWAY)
    worker.wait_for("working")


def test_a_tray_that_ended_while_nothing_was_lent_is_missed_soon_after(
    told_long_ago: tuple[RunningWorker, SetClock],
) -> None:
    worker, clock = told_long_ago
    worker.wait_for("starting")
    clock.passed_s += LEASE_S
    assert worker.wait_for("paused").reason == "no_tray"


# contributions


def test_what_was_contributed_outlives_the_worker(places: WorkerPlaces, start: Start) -> None:
    first = start()
    first.serve()
    first.wait_for("working")
    first.wait_until(lambda status: status.today.tokens >= 50, "tokens are counted")
    first.close()
    stats = start().client.stats()
    assert stats.all.tokens >= 50
    assert stats.all.sent_bytes == stats.all.tokens * 100


def test_each_process_is_counted_from_its_own_beginning(worker: RunningWorker) -> None:
    worker.serve()
    for _ in range(2):
        worker.wait_for("working")
        worker.client.pause()
        worker.wait_for("paused")
        worker.client.resume()
    assert worker.client.stats().today.sessions >= 2


# the program


@pytest.fixture
def program(places: WorkerPlaces) -> Iterator[subprocess.Popen[bytes]]:
    chosen(places, rules={"presence": "headless", "busy_cpu": {"in_use": 1.0, "away": 1.0}})
    code = (
        "from tests.worker.worlds import PRETEND_NODE; from swarmkit.worker.main import run_worker;"
        "run_worker(node_command=PRETEND_NODE)"
    )
    environment = {**os.environ, "SWARMKIT_WORKER_HOME": str(places.config.parent)}
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def client(program: subprocess.Popen[bytes], places: WorkerPlaces) -> WorkerClient:
    client = WorkerClient(places)
    wait_until(lambda: client.runs and client.status().state == "working", "the program works", every=0.05)
    return client


def test_a_worker_that_is_killed_takes_its_node_with_it(
    program: subprocess.Popen[bytes], client: WorkerClient
) -> None:
    node = client.status().node
    assert node is not None
    program.kill()
    program.wait()
    wait_until(lambda: not psutil.pid_exists(node.pid), "the node process has ended")


def test_after_a_worker_was_killed_another_one_can_start(
    program: subprocess.Popen[bytes], client: WorkerClient, start: Start
) -> None:
    program.kill()
    program.wait()
    assert start().wait_for("working")


def test_sigterm_ends_it_and_all_its_processes(
    program: subprocess.Popen[bytes], client: WorkerClient
) -> None:
    children = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 0
    assert not [child for child in children if child.is_running()]


def test_the_worker_has_imported_no_heavy_library(
    program: subprocess.Popen[bytes], client: WorkerClient
) -> None:
    maps = Path(f"/proc/{program.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not tell which libraries a process has loaded")
    libraries = maps.read_text()
    assert "torch" not in libraries


def test_the_log_never_grows_beyond_its_files(places: WorkerPlaces) -> None:
    places.make()
    handler = log_to(places, verbose=False, most_bytes=1000)
    logger = logging.getLogger("swarmkit.worker.any")
    for number in range(200):
        logger.warning("line %d of the log, which is to be kept", number)
    logging.getLogger("swarmkit.worker").removeHandler(handler)
    handler.close()
    files = sorted(places.log.parent.glob("worker.log*"))
    assert [file.name for file in files] == [f"worker.log{end}" for end in ("", ".1", ".2", ".3")]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 199" in places.log.read_text()


def test_the_log_is_kept(program: subprocess.Popen[bytes], client: WorkerClient) -> None:
    assert any("Working for 1 session" in line for line in client.log(50))
