"""The live views in JupyterLab: they paint, follow, react, survive a restart, and do not slow down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import FOCUS_SEEN, SCREENSHOTS, barriers, tab_to

pytest.importorskip("nbformat")
pytest.importorskip("jupyterlab")
pytest.importorskip("anywidget")

from .lab import KERNEL_IDLE, START, Lab, run, run_all, view

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.timeout(600)
def test_a_view_follows_an_answer_and_a_button_kills_a_server(
    lab: Lab, page: Any, screenshot: Callable[..., None]
) -> None:
    lab.open(page, [START, "view = PipelineView(model, swarm)\nview"])
    run_all(page)
    shown = view(page)
    run(page, "answer = generate_in_background(model, **inputs, max_new_tokens=1500, min_new_tokens=1500)")
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('tokens/s')")
    screenshot(shown, "running")
    assert shown.locator("button", has_text="Kill").count() == 4
    shown.get_by_role("button", name="Kill server-0").click()
    shown.get_by_role("button", name="Kill server-1").click()
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('✕')")
    page.wait_for_function("document.querySelectorAll('.swarmkit-live button').length === 5")
    screenshot(shown, "killed")
    run(page, "answer.stop(); assert answer.result(60).shape[1] > 5; view.stop(); swarm.close()")
    assert "ended" in shown.locator(".sk-status").inner_text()


@pytest.mark.timeout(600)
def test_a_view_is_used_by_keyboard(lab: Lab, page: Any, screenshot: Callable[..., None]) -> None:
    lab.open(page, [START, "view = PipelineView(model, swarm)\nview"])
    run_all(page)
    shown = view(page)
    run(page, "model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)")
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('ms')")
    page.locator(".jp-OutputArea-output").last.click(position={"x": 2, "y": 2})
    shown.locator(".sk-drawing").focus()
    page.keyboard.press("Shift+Tab")
    tab_to(page, "focused.className === 'sk-drawing'")
    assert page.evaluate(FOCUS_SEEN)
    told = shown.locator(".sk-status")
    page.keyboard.press("ArrowRight")
    first = told.inner_text()
    page.keyboard.press("ArrowDown")
    assert first
    assert told.inner_text() != first
    assert shown.locator(".sk-at").count() == 1
    screenshot(shown)
    page.keyboard.press("Escape")
    assert told.inner_text() == ""
    tab_to(page, "focused.textContent.startsWith('Kill server-0')")
    assert page.evaluate(FOCUS_SEEN)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.swarmkit-live').textContent.includes('✕')")
    run(page, "assert not swarm.servers[0].alive")
    page.wait_for_function("!document.querySelector('.sk-buttons').textContent.includes('Kill server-0')")
    assert page.evaluate("document.querySelector('.swarmkit-live').contains(document.activeElement)")
    run(page, "view.stop(); swarm.close()")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_the_views_have_no_serious_barrier(
    lab: Lab, new_page: Callable[..., Any], screenshot: Callable[..., None], theme: str
) -> None:
    page = new_page()
    shown = (
        "for each in (PipelineView(model, swarm), SwarmView(swarm), SessionTimeline(model)): display(each)"
    )
    training = "training = TrainingView(model)\nfor step in range(20): training.log(3 / (step + 1))\ntraining"
    lab.open(
        page, [START, "_ = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12)", shown, training]
    )
    page.evaluate(f"() => jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
    run_all(page)
    page.wait_for_function("document.querySelectorAll('.swarmkit-live svg').length === 4")
    found = {}
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        if width < 760:  # as a person does on a phone, to see the notebook at all
            page.evaluate("() => jupyterapp.shell.collapseLeft()")
        for number in range(4):
            each = view(page, number)
            each.scroll_into_view_if_needed()
            screenshot(each, f"{width}-{number}")
        if serious := barriers(page, ".swarmkit-live"):
            found[width] = serious
    assert found == {}
    run(page, "swarm.close()")


@pytest.mark.timeout(600)
def test_a_view_paints_at_once(lab: Lab, page: Any) -> None:
    """How long it takes from the start of the cell is kept beside the pictures, for people to read."""
    lab.open(page, [START, "view = PipelineView(model, swarm)\nview"])
    run(page, START)
    page.evaluate(
        """() => {
            window.painted = new Promise((resolve) => {
                const seen = () => document.querySelector('.swarmkit-live svg');
                const watch = new MutationObserver(() => {
                    if (!seen()) return;
                    watch.disconnect();
                    requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now())));
                });
                watch.observe(document.body, {childList: true, subtree: true});
            });
            window.began = performance.now();
            jupyterapp.commands.execute('notebook:move-cursor-down');
            jupyterapp.commands.execute('notebook:run-cell');
        }"""
    )
    milliseconds = page.evaluate("async () => (await window.painted) - window.began")
    record("first-paint", {"milliseconds": round(milliseconds)})
    assert view(page).locator("svg").count() == 1
    run(page, "view.stop(); swarm.close()")


@pytest.mark.timeout(600)
def test_after_a_restart_and_a_reload_the_last_picture_is_there(
    lab: Lab, page: Any, screenshot: Callable[..., None]
) -> None:
    shutil.copy(ROOT / "notebooks" / "quickstart.ipynb", lab.folder / "quickstart.ipynb")
    lab.show(page, "quickstart")
    run_all(page)
    page.wait_for_function("document.querySelectorAll('.swarmkit-live').length === 2", timeout=120_000)
    page.wait_for_function(KERNEL_IDLE, timeout=120_000)
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.reload()
    page.wait_for_selector(".jp-Notebook")
    page.wait_for_function("document.querySelectorAll('.swarmkit-live svg').length === 2")
    assert "Error displaying widget" not in page.locator(".jp-Notebook").inner_text()
    screenshot(page)


@pytest.mark.timeout(600)
def test_updates_do_not_slow_down_or_fill_the_page(lab: Lab, page: Any) -> None:
    lab.open(
        page,
        [
            START,
            "view = SessionTimeline(model, last=60)\nview",
            "model.generate(**inputs, max_new_tokens=80)",
        ],
    )
    run_all(page)
    view(page)
    page.wait_for_function("document.querySelectorAll('.swarmkit-live rect').length > 20")
    page.evaluate(
        """() => {
            const drawing = document.querySelector('.swarmkit-live .sk-drawing');
            window.painted = [];
            new MutationObserver(() => window.painted.push(performance.now()))
                .observe(drawing, {childList: true});
        }"""
    )
    client = page.context.new_cdp_session(page)

    def heap() -> float:
        client.send("HeapProfiler.collectGarbage")
        return float(client.send("Runtime.getHeapUsage")["usedSize"]) / 2**20

    def counts() -> dict[str, float]:
        """What the page has done and holds, in counts that no other load on the machine changes."""
        heap()  # collects garbage
        found = {each["name"]: each["value"] for each in client.send("Performance.getMetrics")["metrics"]}
        return {
            name: found[name] for name in ("Nodes", "JSEventListeners", "LayoutCount", "RecalcStyleCount")
        }

    # No more updates are under way than a kernel's socket queues for a slow reader; it drops what is beyond.
    burst = """
for number in range({start}, {start} + 250):
    view.svg = drawn.replace("steps:", f"steps {{number}}:")
"""
    client.send("Performance.enable")
    run(page, "view.stop(); drawn = view.svg")  # so that nothing but the bursts draws
    before, seconds, did = heap(), [], []
    for start in range(0, 10_000, 250):
        page.evaluate("() => { window.painted = []; }")
        earlier = counts()
        run(page, burst.format(start=start))
        page.wait_for_function(
            f"document.querySelector('.swarmkit-live').textContent.includes('steps {start + 249}:')"
        )
        painted = page.evaluate("() => window.painted")
        seconds.append((painted[-1] - painted[0]) / max(1, len(painted) - 1))
        later = counts()
        did.append({"updates": len(painted), **{name: later[name] - earlier[name] for name in later}})
        did[-1]["nodes"], did[-1]["listeners"] = later["Nodes"], later["JSEventListeners"]
    grown = heap() - before
    figures = {"ms_an_update": [round(each, 2) for each in seconds], "heap_grew_by_mb": round(grown, 1)}
    first, *_, last = did
    record("ten-thousand-updates", {**figures, "first": first, "last": last})
    assert grown < 20
    for held in ("nodes", "listeners"):
        assert last[held] <= 1.2 * first[held], held
    for work in ("LayoutCount", "RecalcStyleCount"):
        # the browser lays out once for several updates, as often as it has time
        assert last[work] <= 1.2 * first["updates"], work
    run(page, "swarm.close()")


def record(name: str, figures: dict[str, Any]) -> None:
    """Keep figures that are looked at, and not asserted on, beside the pictures."""
    print(name, figures)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / f"{name}.json").write_text(json.dumps(figures, indent=2))
