"""The child's side of `soak.py`: clients that come, go, break off and walk away, until its input closes.

Every client is a thread. What each of them did is told in one JSON line; a child that is killed has told all
but what it was doing.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import warnings
from collections import Counter
from typing import Any

import torch

from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.session.session import Session
from swarmkit.errors import SessionError
from swarmkit.events import Event, StepFinished, following
from swarmkit.net import portal
from swarmkit.settings import ClientSettings

_PATIENT = ClientSettings().replace(
    first_step_timeout_s=120.0, min_step_timeout_s=60.0, route_timeout_s=120.0
)
_LONGEST_IDLE_S = 4.0
_LONGEST_STEP_S = 1.0
_JOIN_S = 180.0


class _SoakClients:
    """The clients of this process, and what they tell."""

    def __init__(self, model: SwarmModelForCausalLM, options: dict[str, Any]) -> None:
        self._model = model
        self._answers = [torch.tensor([ids]) for ids in options["answers"]]
        self._new_tokens: int = options["new_tokens"]
        self._long_tokens: int = options["long_tokens"]
        self._seed: int = options["seed"]
        self._enough = threading.Event()
        self._telling = threading.Lock()
        self._threads = [
            threading.Thread(target=self._live, args=(number,), name=f"swarmkit-soak-{number}")
            for number in range(options["clients"])
        ]

    def run(self) -> None:
        """Let them live until nothing more can be read."""
        for thread in self._threads:
            thread.start()
        sys.stdin.read()
        self._enough.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            if thread.is_alive():
                self.tell("stuck", error=f"{thread.name} did not end")

    def tell(self, did: str, **more: Any) -> None:
        with self._telling:
            sys.stdout.write(json.dumps({"did": did, **more}) + "\n")
            sys.stdout.flush()

    def event(self, event: Event) -> None:
        if not isinstance(event, StepFinished):
            self.tell("event", kind=type(event).__name__)

    def _live(self, number: int) -> None:
        chance = random.Random(f"{self._seed}-{number}")
        ways = Counter({"answer": 4, "talk": 3, "cut_off": 2, "cancel": 2, "walk_away": 2})
        while not self._enough.is_set():
            way = chance.choice(list(ways.elements()))
            try:
                self.tell(getattr(self, f"_{way}")(chance))
            except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
                self.tell("failed", error=f"{way}: {type(error).__name__}: {error}")
            self._enough.wait(chance.uniform(0, 0.2))

    def _answer(self, chance: random.Random) -> str:
        """One answer, alone in its session."""
        whole = chance.choice(self._answers)
        return self._verdict(whole, self._generate(whole, whole.shape[1]))

    def _talk(self, chance: random.Random) -> str:
        """An answer with a pause in the midst, in which others may take what the session holds."""
        whole = chance.choice(self._answers)
        half = whole.shape[1] - self._new_tokens // 2
        with self._model.session(max_length=whole.shape[1]):
            self._generate(whole, half)
            self._enough.wait(chance.uniform(0, _LONGEST_IDLE_S))
            return self._verdict(whole, self._generate(whole, whole.shape[1], given=half))

    def _cut_off(self, chance: random.Random) -> str:
        """The session is closed by another thread while it answers."""
        whole = chance.choice(self._answers)
        session = self._model.session(max_length=whole.shape[1])
        timer = threading.Timer(chance.uniform(0, _LONGEST_STEP_S), session.close)
        timer.start()
        try:
            with session:
                found = self._generate(whole, whole.shape[1])
        except SessionError:
            return "cut off"
        finally:
            timer.join()
        return self._verdict(whole, found)

    def _cancel(self, chance: random.Random) -> str:
        """A long prompt is given up, as Ctrl-C does."""
        session = self._session(self._long_tokens)
        try:
            with portal.lease() as lease:
                step = lease.start_task_soon(session.chain.step, self._noise(self._long_tokens))
                time.sleep(chance.uniform(0, _LONGEST_STEP_S))
                return "cancelled" if step.cancel() else "in time"
        finally:
            session.close()

    def _walk_away(self, chance: random.Random) -> str:
        """A session is left open, and forgotten after a while."""
        session = self._session(64)
        session.step(self._noise(chance.randrange(1, 64)))
        self._enough.wait(chance.uniform(0, _LONGEST_IDLE_S))
        return "walked away"

    def _session(self, max_length: int) -> Session:
        return self._model.session(max_length=max_length)

    def _noise(self, tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, self._model.connection.client.model.hidden_size)

    def _generate(self, whole: torch.Tensor, upto: int, given: int | None = None) -> torch.Tensor:
        """Greedy tokens [1, upto], after the first `given` of an answer; the prompt if not said."""
        start = whole.shape[1] - self._new_tokens if given is None else given
        found: torch.Tensor = self._model.generate(
            whole[:, :start],
            attention_mask=torch.ones(1, start, dtype=torch.int64),
            max_new_tokens=upto - start,
            min_new_tokens=upto - start,
            do_sample=False,
        )
        return found

    def _verdict(self, wanted: torch.Tensor, found: torch.Tensor) -> str:
        return "answered" if torch.equal(wanted, found) else "answered wrongly"


def _main(options: dict[str, Any]) -> None:
    # The clients of this process are threads that share a model, and none means another's session.
    warnings.filterwarnings("ignore", message=".*open in another thread")
    torch.set_num_threads(1)
    with SwarmModelForCausalLM.from_pretrained(
        options["name"], initial_peers=options["peers"], settings=_PATIENT
    ) as model:
        clients = _SoakClients(model, options)
        clients.tell("ready")
        with following(model.connection.client.events, clients.event):
            clients.run()
    clients.tell("left")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
