"""Write the tray's pictures of README anew, from a real tray on a small desktop: `make pictures`.

The tray starts a worker, which serves tiny-chat, and a client has stories told by it. The desktop is that of
the tests: an X server whose screen nobody sees, with a window manager and a panel.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from swarmkit_app.tray.face import Shape

from swarmkit import SwarmModelForCausalLM
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from tests.app.tray.desktop import HEIGHT, WIDTH, SeenDesktop, seen_desktop, why_not
from tests.waiting import wait_until

if TYPE_CHECKING:
    from PIL import Image

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
_QUESTIONS = ("Tell me a story about a fox.", "Tell me a story about the sea.", "What colour has the sky?")
_LEAST_TOKENS = 1500
_WALL = 0x35506B
_PANEL = 115, 34
"""Width and height of what is shown of the panel."""
_STATES: tuple[tuple[Shape, str], ...] = (
    ("serving", "ready"),
    ("working", "working for somebody"),
    ("paused", "paused"),
    ("trouble", "trouble"),
)
_CHOSEN: dict[str, Any] = {
    "agreed": True,
    "serve": {"model": "tiny-chat"},
    # The hand that opens the menu, the client and what else runs on this machine count as its user's.
    "rules": {
        "only_when_away": False,
        "on_battery": True,
        "on_metered": True,
        "busy_cpu": {"in_use": 1.0, "away": 1.0},
    },
}


def write_tray_pictures(chromium: str) -> None:
    """Go through all states of a tray, and keep what a person sees.

    Args: chromium: the program.
    """
    from playwright.sync_api import sync_playwright

    if missing := why_not():
        print(f"no desktop here, so the tray's pictures stay as they are: {missing}")
        return
    with tempfile.TemporaryDirectory() as folder, seen_desktop(Path(folder)) as desktop:
        desktop.paint(_WALL)
        with _tray(desktop, Path(folder)) as tray, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            _photograph(desktop, tray, browser)
            browser.close()
    print("wrote tray-states.png, tray-menu.png, tray-dashboard.png and tray-wizard.png")


class _Tray:
    """A tray that runs, and its worker."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str], home: Path) -> None:
        self._process, self._environment = process, environment
        self.client = WorkerClient(WorkerPlaces.inside(home))

    def link(self) -> str:
        """The address that it opens next in the person's browser."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("http"):
                return line.strip()
        raise SystemExit("the tray has ended")

    def open(self) -> str:
        """Have the dashboard opened; its address."""
        subprocess.run(
            [sys.executable, "-m", "swarmkit.cli", "tray", "--open"], env=self._environment, check=True
        )
        return self.link()

    def wait(self, *states: str) -> None:
        """Wait for one of some states of the worker."""
        wait_until(
            lambda: self.client.runs and self.client.status().state in states,
            f"the worker is {' or '.join(states)}",
            within=180.0,
            every=0.2,
        )


@contextmanager
def _tray(desktop: SeenDesktop, home: Path) -> Iterator[_Tray]:
    environment = {**desktop.environment, HOME_VARIABLE: str(home), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "swarmkit.cli", "tray", "--link", "--host", "status-notifier"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Tray(process, environment, home)
    finally:
        process.terminate()
        process.communicate(timeout=120)


def _photograph(desktop: SeenDesktop, tray: _Tray, browser: Any) -> None:
    icons = {}
    page = browser.new_page(viewport={"width": 1000, "height": 600})
    page.goto(tray.link())
    page.get_by_role("heading", name="Lend this computer").wait_for()
    page.screenshot(path=str(IMAGES / "tray-wizard.png"))
    icons["paused"] = _icon(desktop, "paused")
    tray.client.change_settings(_CHOSEN)
    tray.wait("serving")
    icons["serving"] = _icon(desktop, "serving")
    node = tray.client.status().node
    assert node is not None
    with _visitor(node.addresses):
        wait_until(
            lambda: tray.client.status().all.tokens > _LEAST_TOKENS, "it has worked for a while", within=300.0
        )
        icons["working"] = _icon(desktop, "working")
        _menu(desktop).save(IMAGES / "tray-menu.png")
        page.set_viewport_size({"width": 1000, "height": 1200})
        page.goto(tray.open())
        page.locator("#words", has_text="Working for 1 session").wait_for()
        page.get_by_role("heading", name="What swarmkit keeps").wait_for()
        shown = page.locator("section", has=page.get_by_role("heading", name="What you have given"))
        box = shown.bounding_box()
        clip = {"x": 0, "y": 0, "width": 1000, "height": box["y"] + box["height"] + 16}
        page.screenshot(path=str(IMAGES / "tray-dashboard.png"), clip=clip)
    tray.client.change_settings({"serve": {"model": str(Path("/nowhere/a-model"))}})
    tray.wait("trouble")
    icons["trouble"] = _icon(desktop, "trouble")
    _beside_each_other([(icons[shape], words) for shape, words in _STATES]).save(IMAGES / "tray-states.png")


@contextmanager
def _visitor(addresses: Sequence[str]) -> Iterator[None]:
    """A client that has one story after the other told, inside the `with` block."""
    tokenizer = Checkpoint.open("tiny-chat").tokenizer()
    ended = threading.Event()
    torch.set_num_threads(1)
    with SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=list(addresses)) as model:

        def listen() -> None:
            for number in range(10_000):
                text = _QUESTIONS[number % len(_QUESTIONS)]
                question: Any = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                with model.session():
                    model.generate(**question, max_new_tokens=200, do_sample=True)
                    if ended.wait(0.5):
                        return

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _icon(desktop: SeenDesktop, shape: Shape) -> Image.Image:
    """The end of the panel with the icon of a state, which the mouse does not touch."""
    desktop.do("mousemove", "200", "200")
    desktop.wait_for_icon(shape)
    time.sleep(1.0)  # the panel may still be drawing
    return desktop.picture().crop((WIDTH - _PANEL[0], HEIGHT - _PANEL[1], WIDTH, HEIGHT))


def _menu(desktop: SeenDesktop) -> Image.Image:
    """The menu with the pauses open, the icon below it, and a little of the desktop around."""
    from PIL import ImageChops

    before = desktop.picture()
    desktop.open_menu("working")
    desktop.press("Down", "Right")
    time.sleep(0.5)
    after = desktop.picture()
    desktop.press("Escape", "Escape")
    changed = ImageChops.difference(before, after).getbbox()
    assert changed is not None
    return after.crop((max(0, changed[0] - 20), max(0, changed[1] - 20), WIDTH, HEIGHT))


def _beside_each_other(icons: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures twice as large, each with words below it."""
    from PIL import Image, ImageDraw, ImageFont

    wide, high = 2 * _PANEL[0] + 20, 2 * _PANEL[1] + 34
    whole = Image.new("RGB", (wide * len(icons) - 20, high), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(18)
    for number, (icon, words) in enumerate(icons):
        large = icon.resize((2 * icon.width, 2 * icon.height), Image.Resampling.LANCZOS)
        whole.paste(large, (number * wide, 0))
        place = number * wide + large.width // 2, high - 16
        draw.text(place, words, fill="#1b1f24", font=font, anchor="mm")
    return whole
