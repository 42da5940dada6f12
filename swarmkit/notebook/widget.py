"""The widget that shows a drawing, takes a new one a few times a second, and has buttons below it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swarmkit.drawing import bundle
from swarmkit.errors import UsageError

if find_spec("anywidget") is None:
    raise UsageError('the live views need anywidget; install it with pip install "swarmkit-llm[notebook]"')

import anywidget
import traitlets

_STATIC = Path(__file__).parent / "static"

Button = dict[str, str]
"""`action` and `target` are sent when it is pressed, `label` stands on it, and `title` says what it does."""


class LiveDrawing(anywidget.AnyWidget):
    """An SVG drawing that Python replaces, a text below it, and buttons that Python reacts to.

    What a notebook keeps of it is readable without Python: the front end is asked to save the widget's
    state with the notebook, and pages without widgets show the drawing as HTML.
    """

    _esm = _STATIC / "live.js"
    _css = _STATIC / "live.css"
    # With ipywidgets 7, as in Colab, this method would display the widget alone and skip the other forms.
    _ipython_display_ = None

    svg = traitlets.Unicode("").tag(sync=True)
    summary = traitlets.Unicode("").tag(sync=True)
    tokens = traitlets.Unicode("").tag(sync=True)
    buttons = traitlets.List(traitlets.Dict()).tag(sync=True)
    notice = traitlets.Unicode("").tag(sync=True)
    ended = traitlets.Bool(False).tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self.rows_now: Callable[[], Sequence[Sequence[str]]] = lambda: [("",)]
        self._handlers: dict[str, Callable[[str], object]] = {}
        self.on_msg(self._receive)

    def on_button(self, action: str, handler: Callable[[str], object]) -> None:
        """Call `handler(target)`, in a thread of its own, when a button with this action is pressed.

        What it raises is shown below the buttons.
        """
        self._handlers[action] = handler

    def static_bundle(self) -> dict[str, str]:
        """The forms that need no widgets, by MIME type."""
        forms = bundle.bundle(self.summary, self.svg, self.rows_now())
        if self.tokens:
            text = f'<div style="white-space:pre-wrap;max-width:780px">{self.tokens}</div>'
            forms["text/html"] += text
        return forms

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        live = super()._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live or {}, {})
        return {**data, **self.static_bundle()}, metadata

    def _receive(self, _: object, content: Any, buffers: object) -> None:
        if not isinstance(content, dict):
            return
        handler = self._handlers.get(str(content.get("action")))
        if handler is not None:
            target = str(content.get("target", ""))
            # The kernel's thread must stay free: to stop a server may take seconds.
            threading.Thread(
                target=self._handle, args=(handler, target), name="swarmkit-button", daemon=True
            ).start()

    def _handle(self, handler: Callable[[str], object], target: str) -> None:
        try:
            self.notice = "…"
            handler(target)
        except Exception as error:  # noqa: BLE001 - a person pressed a button, and is told what came of it
            self.notice = str(error)
        else:
            self.notice = ""

    def end(self) -> None:
        """Say that nothing follows; the last drawing stays."""
        with contextlib.suppress(Exception):  # the front end may be gone, and the kernel about to end
            self.buttons = []
            self.ended = True
