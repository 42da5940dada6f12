"""`swarmkit demo`: four servers, a chat, and a server that dies in the middle of an answer."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, Verbose, app
from swarmkit.cli.interrupt import interruptible
from swarmkit.cli.local_servers import start_servers
from swarmkit.cli.page import has_display, is_installed, show_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarmkit.client.chat import ChatAnswer
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.events import PeerReplaced
    from swarmkit.local.server_process import ServerProcess
    from swarmkit.local.swarm import LocalSwarm

_CONVERSATION = ("Hello! Who are you?", "Tell me a story about a fox.", "What is 7 + 5?")
_KILL_IN = 1
"""In which answer of the short conversation a server is killed: a long one."""


@dataclass
class _Killed:
    """What happened when a server was killed in the middle of an answer."""

    answer: ChatAnswer
    undisturbed: ChatAnswer
    server: ServerProcess
    replaced: PeerReplaced | None
    stall_ms: float

    @property
    def equal(self) -> bool:
        return self.answer.tokens == self.undisturbed.tokens


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", help="`tiny-chat`, a local folder, or a Hub repo id.")] = (
        "tiny-chat"
    ),
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the playground, where there is a display.")
    ] = True,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Start four server processes, chat over them, and kill one in the middle of an answer.

    On a terminal with a display, the playground opens in the browser. With --no-browser, or without a
    display, you type in the terminal. Without a terminal a short conversation is played: an answer is
    compared, token by token, with the same answer given without a disturbance, and the exit code is 0 if
    they are equal.

    Examples:

        swarmkit demo

        swarmkit demo --json </dev/null | jq .stall_ms
    """
    console.setup(verbose, 1)
    console.quiet_transformers()
    console.set_threads(1)
    if json:
        console.to_stderr()
    with start_servers(model) as swarm:
        remote = swarm.model()
        demo_run = _Demo(swarm, remote, swarm.tokenizer())
        interactive = sys.stdin.isatty() and not json
        if interactive and browser and has_display() and is_installed():
            with interruptible():
                show_page([remote], swarm)
            return
        try:
            with interruptible():
                killed = demo_run.interactive() if interactive else demo_run.play()
        except KeyboardInterrupt:
            console.out.print("\nleaving")
            return
        with _leaving():
            swarm.close()
    if killed is None:
        return
    if json:
        console.emit_json(
            answer=killed.answer.text,
            undisturbed=killed.undisturbed.text,
            equal=killed.equal,
            killed=killed.server.public_name,
            replaced_by=list(killed.replaced.route) if killed.replaced else [],
            stall_ms=round(killed.stall_ms, 1),
            tokens_per_s=round(killed.undisturbed.tokens_per_s, 1),
        )
    if not killed.equal:
        raise typer.Exit(1)


def _leaving():  # type: ignore[no-untyped-def]
    return console.busy("stopping the servers")


class _Demo:
    """A conversation over a local swarm."""

    def __init__(
        self, swarm: LocalSwarm, remote: SwarmModelForCausalLM, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._swarm = swarm
        self._remote = remote
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []

    def play(self) -> _Killed:
        """The short conversation, without a person at the keyboard."""
        killed: _Killed | None = None
        for number, question in enumerate(_CONVERSATION):
            console.out.print(f"\n[bold green]you  ›[/] {question}")
            if number == _KILL_IN:
                killed = self._ask_and_kill(question)
            else:
                self._ask(question)
        assert killed is not None
        return killed

    def interactive(self) -> _Killed | None:
        """The user's conversation; the first answer is disturbed, later ones on `/kill`."""
        from swarmkit.cli.chat import lines, show_route

        console.out.print(
            "\nAsk something, for example [italic]Tell me a story about a fox.[/]  A server will be killed "
            "in the middle of the answer.\n[dim]/kill disturbs the next answer too · /route shows the hops · "
            "/quit ends[/]"
        )
        worst: _Killed | None = None
        kill_next = True
        for line in lines("you  › "):
            if line == "/quit":
                break
            if line == "/route":
                show_route(self._remote)
            elif line == "/kill":
                kill_next = True
                console.out.print("a server will be killed in the middle of the next answer", style="dim")
            elif kill_next:
                killed = self._ask_and_kill(line)
                worst = killed if worst is None or worst.equal else worst
                kill_next = False
                self._refill(killed.server)
            else:
                self._ask(line)
        return worst

    def _ask(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        console.out.print("model› ", end="", style="bold cyan")
        answer = self._answer(self._write)
        console.out.print(f"\n[dim]{answer.tokens_per_s:.0f} tokens/s[/]")
        self._show_route()
        self._messages.append({"role": "assistant", "content": answer.text})

    def _ask_and_kill(self, question: str) -> _Killed:
        """ChatAnswer twice: undisturbed and unseen, then before the user's eyes, with a kill half-way."""
        self._messages.append({"role": "user", "content": question})
        undisturbed = self._answer(lambda text: None)
        # The way this answer went is the way the next one will go, as nothing has changed since.
        victim = self._victim()
        half = max(1, len(undisturbed.tokens) // 2)
        killer = _Killer(victim, half)
        known = len(self._remote.events)

        console.out.print("model› ", end="", style="bold cyan")
        answer = self._answer(self._write, killer.on_token)
        killer.join()
        console.out.print()
        killed = _Killed(answer, undisturbed, victim, self._replacement(known), killer.stall_ms(answer))
        self._report(killed, killer)
        self._messages.append({"role": "assistant", "content": answer.text})
        return killed

    def _answer(self, write, on_token=lambda count: None) -> ChatAnswer:  # type: ignore[no-untyped-def]
        from swarmkit.client.chat import chat_answer

        return chat_answer(
            self._remote, self._tokenizer, self._messages, write=write, on_token=on_token, max_new_tokens=160
        )

    def _write(self, text: str) -> None:
        console.out.print(text, end="", markup=False)

    def _victim(self) -> ServerProcess:
        """The last server of the route in use."""
        used = self._remote.trace[-1].hops[-1].peer_id
        return next(server for server in self._swarm.servers if server.peer_id == used)  # type: ignore[return-value]

    def _replacement(self, known: int) -> PeerReplaced | None:
        from swarmkit.events import PeerReplaced

        return next((event for event in self._remote.events[known:] if isinstance(event, PeerReplaced)), None)

    def _refill(self, dead: ServerProcess) -> None:
        with console.busy(f"starting another server for blocks {dead.blocks[0]}:{dead.blocks[1]}"):
            self._swarm.add_server(dead.blocks)

    def _report(self, killed: _Killed, killer: _Killer) -> None:
        low, high = killed.server.blocks
        console.out.print(
            f"[red]✗[/] {killed.server.public_name} (blocks {low}:{high}, pid {killed.server.pid}) was "
            f"killed with SIGKILL after token {killer.after} of {len(killed.answer.tokens)}"
        )
        if killed.replaced is not None:
            console.out.print(
                f"[green]✓[/] replaced by {' → '.join(killed.replaced.route)}, which was sent the "
                f"{killed.replaced.replayed_tokens} tokens so far; "
                f"the next token came after {killed.stall_ms:.0f} ms"
            )
        same = (
            "[green]✓[/] the answer equals the undisturbed one"
            if killed.equal
            else "[red]✗[/] the answer differs from the undisturbed one"
        )
        console.out.print(
            f"{same} ({len(killed.answer.tokens)} and {len(killed.undisturbed.tokens)} tokens compared)"
        )
        if not killed.equal:
            console.out.print(f"  undisturbed: {killed.undisturbed.text}", markup=False)
        self._show_route()

    def _show_route(self) -> None:
        from swarmkit.cli.route_table import route_table

        console.out.print(route_table(self._remote.trace))


class _Killer:
    """Kills a server, from a thread of its own, once an answer has so many tokens."""

    def __init__(self, victim: ServerProcess, after: int) -> None:
        self._victim = victim
        self._at = 0.0
        self._thread = threading.Thread(target=self._kill, name="swarmkit-demo-kill")
        self.after = after

    def on_token(self, count: int) -> None:
        if count == self.after:
            self._thread.start()

    def _kill(self) -> None:
        self._at = time.perf_counter()
        self._victim.kill()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def stall_ms(self, answer: ChatAnswer) -> float:
        """The longest wait for a token since the kill."""
        stamps = [stamp for stamp in answer.stamps if stamp >= self._at]
        if not self._at or not stamps:
            return 0.0
        waits = [stamps[0] - self._at, *(b - a for a, b in pairwise(stamps))]
        return max(waits) * 1e3
