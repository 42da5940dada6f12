"""The playground behind a socket, in a thread of its own."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

# Before gradio is imported, which reads them: no statistics are sent, and no model hub is asked.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Gradio would keep every question and answer in the browser, also of visitors who wish to keep none.
os.environ["GRADIO_RUN_HISTORY"] = "False"

from swarmkit.api.engine import AnswerEngine
from swarmkit.errors import TransportError, UsageError
from swarmkit_app.playground.answering import Answering
from swarmkit_app.playground.page import MOST_TOKENS, build_page
from swarmkit_app.playground.style import CSS, HEAD, theme
from swarmkit_app.playground.visitors import Allowance
from swarmkit_app.playground.waiting_line import WaitingLine

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.local.swarm import LocalSwarm

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Playground:
    """A page for one or several models; a context manager.

    Example::

        with Playground([model], swarm=swarm) as playground:
            print(playground.url)
            playground.wait()

    Args:
        models: what the page offers, the first one chosen.
        swarm: the local swarm of the model's servers, if visitors may kill and add servers.
        host, port: where it listens; 0 = any free port.
        password: the password that visitors give, with any name.
        max_running: answers at a time; others wait, and see their place in the line.
        max_waiting: answers that wait; further ones are refused.
        answers_per_minute: answers that one visitor may ask for within a minute; None = any number.
        max_tokens: of an answer.

    Raises:
        UsageError: it would listen beyond this machine without a password.
        TransportError: the address cannot be listened at.
    """

    def __init__(
        self,
        models: list[SwarmModelForCausalLM],
        swarm: LocalSwarm | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        password: str | None = None,
        max_running: int = 8,
        max_waiting: int = 64,
        answers_per_minute: int | None = None,
        max_tokens: int = MOST_TOKENS,
    ) -> None:
        if host not in _LOOPBACK and password is None:
            raise UsageError(
                f"everybody who reaches {host} could use the page; give it a password, or listen on 127.0.0.1"
            )
        self._engines = {model.connection.client.model.name: AnswerEngine(model) for model in models}
        line = WaitingLine(max_running, max_waiting)
        self.answering = Answering(self._engines, line, Allowance(answers_per_minute))
        self.page = build_page(self.answering, swarm, max_tokens)
        # Gradio's own queue lets everything through, also what is to be refused: the line above decides.
        most = 2 * (max_running + max_waiting)
        self.page.queue(max_size=most, api_open=False, default_concurrency_limit=None)
        try:
            _, self.url, _ = self.page.launch(
                server_name=host,
                server_port=port or _free_port(host),
                auth=None if password is None else lambda name, given: given == password,
                share=False,
                inline=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=True,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                theme=theme(),
                css=CSS,
                head=HEAD,
                max_threads=most,
            )
        except OSError as error:
            self._close_engines()
            raise TransportError(f"cannot listen at {host}, port {port}: {error}") from None

    def wait(self) -> None:
        """Serve until the program is interrupted."""
        self.page.block_thread()

    def close(self) -> None:
        """End all answers, and listen no longer. May be called twice."""
        try:
            self.page.close(verbose=False)
        except RuntimeError:
            # Gradio wakes its event loop from this thread, which fails where the loop does that just then.
            # By that time only the server is left to end.
            self.page.server.close()
        self._close_engines()

    def __enter__(self) -> Playground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.bind((host, 0))
        return int(held.getsockname()[1])
