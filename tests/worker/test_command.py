"""`swarmkit worker …` does what a tray does, on a computer without a desktop."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from swarmkit.cli.worker import worker_app
from swarmkit.errors import UsageError
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.offline import settings_offline
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from tests.worker.worlds import RunningWorker


@pytest.fixture(autouse=True)
def own_home(places: WorkerPlaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(places.config.parent))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(worker_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_computer_without_a_desktop_is_lent_and_taken_back(worker: RunningWorker) -> None:
    run("set", "serve.model=quick", "rules.presence=headless", "agreed=true")
    worker.wait_for("working")
    assert run("status").startswith("Working for 1 session")
    run("pause", "--until", "1h")
    worker.wait_for("paused")
    assert run("status").startswith("Paused: until ")
    run("resume")
    worker.wait_for("working")


def test_programs_read_json(worker: RunningWorker) -> None:
    assert json.loads(run("status", "--json"))["reason"] == "not_agreed"
    assert len(json.loads(run("stats", "--json", "--days", "3"))["days"]) == 3


def test_stats_show_each_day(worker: RunningWorker) -> None:
    assert "this month" in run("stats", "--days", "2")


@pytest.mark.parametrize(
    ("change", "value"),
    [("20GB", 20 * 10**9), ("1.5GiB", 3 * 2**29), ("123456789", 123456789), ("512MB", 512 * 10**6)],
)
def test_sizes_may_have_units(places: WorkerPlaces, change: str, value: int) -> None:
    run("set", f"limits.disk_bytes.away={change}")
    assert settings_offline(places).limits.disk_bytes.away == value


def test_settings_can_be_changed_while_no_worker_runs(places: WorkerPlaces) -> None:
    run("set", "rules.on_battery=true", 'rules.programs=["blender"]')
    rules = settings_offline(places).rules
    assert (rules.on_battery, rules.programs) == (True, ("blender",))


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="on_batery"):
        run("set", "rules.on_batery=true")


@pytest.mark.parametrize("until", ["soon", "1", "h1", "1w"])
def test_a_pause_without_a_sensible_end_is_refused(worker: RunningWorker, until: str) -> None:
    with pytest.raises(UsageError, match="--until takes"):
        run("pause", "--until", until)


def test_without_a_worker_one_is_told_how_to_start_it() -> None:
    with pytest.raises(NoWorkerError, match="swarmkit worker run"):
        run("status")


def test_what_it_has_put_here_is_shown_with_its_size(worker: RunningWorker) -> None:
    assert "weights of models" in run("belongings") or "settings" in run("belongings")
