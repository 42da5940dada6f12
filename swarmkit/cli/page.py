"""The playground's page, for the commands that show it."""

from __future__ import annotations

import os
import sys
import webbrowser
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from swarmkit.cli import console
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.local.swarm import LocalSwarm


def is_installed() -> bool:
    """Whether the packages of the page are there."""
    return not _missing()


def _missing() -> list[str]:
    return [name for name in ("gradio", "fastapi", "swarmkit_app") if find_spec(name) is None]


def check_installed() -> None:
    """Refuse to go on without the packages of the page.

    Raises:
        UsageError: one is missing; the error says how to install it.
    """
    if missing := _missing():
        raise UsageError(
            f"the playground needs {missing[0]}; install it with `pip install 'swarmkit-llm[app]'`"
        )


def has_display() -> bool:
    """Whether a browser can be opened where the user sees it."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def show_page(
    models: list[SwarmModelForCausalLM],
    swarm: LocalSwarm | None,
    browser: bool = True,
    json: bool = False,
    **options: Any,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        browser: open it, where there is a display.
        json: print its address as JSON.
        options: of `Playground`.
    """
    with console.busy("opening the page"):
        from swarmkit_app.playground import Playground

        page = Playground(models, swarm, **options)
    with page:
        if json:
            console.emit_json(event="listening", url=page.url)
        else:
            console.out.print(f"[green]●[/] the playground is at {page.url}", soft_wrap=True)
            console.out.print("Press Ctrl-C to end.", style="dim")
        if browser and has_display():
            webbrowser.open(page.url)
        try:
            page.wait()
        except KeyboardInterrupt:
            console.out.print("\nleaving")
