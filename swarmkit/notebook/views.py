"""The views: each gathers what its drawing shows, and follows the events of a model."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from swarmkit.client.pictures import server_pictures
from swarmkit.client.token_chances import ChanceRecorder
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.drawing.loss_curve import LossCurve
from swarmkit.drawing.pipeline import pipeline_rows, pipeline_svg, pipeline_text
from swarmkit.drawing.pipeline_log import PipelineLog
from swarmkit.drawing.swarm import least_covered, swarm_rows, swarm_svg, swarm_text
from swarmkit.drawing.timeline import timeline_rows, timeline_svg, timeline_text
from swarmkit.drawing.tokens import tokens_html
from swarmkit.drawing.training import training_rows, training_svg, training_text
from swarmkit.drawing.values import ServerPicture, TrainingPicture
from swarmkit.errors import ModelError, UsageError
from swarmkit.events import (
    Event,
    EventStream,
    MicroBatchFinished,
    PeerLost,
    PeerReplaced,
    Rerouted,
    StepFinished,
    Subscription,
)
from swarmkit.local.swarm import LocalSwarm
from swarmkit.notebook.feed import Feed
from swarmkit.notebook.token_tail import TokenTail
from swarmkit.notebook.widget import Button, LiveDrawing

if TYPE_CHECKING:
    from typing_extensions import Self

    from swarmkit.client.model import SwarmModel
    from swarmkit.client.session.session import Session

_CAPACITY = 4096
_LIKELIEST = 5
_TOKEN_LAP_S = 1.2
"""How long the moving token takes from the client to the last server, while steps run."""


class _View(LiveDrawing):
    """A drawing that follows a model or a swarm until one of them is closed; a context manager."""

    _end_feed: Callable[[], object] = staticmethod(lambda: None)  # of a view that could not be made

    def __init__(
        self,
        followed: SwarmModel | LocalSwarm,
        subscription: Subscription,
        clock: Clock = SYSTEM_CLOCK,
        every_s: float = 1.0,
    ) -> None:
        super().__init__()
        self._clock = clock
        self._is_last = False
        self._draw()
        self._feed = Feed(subscription, self._add, self._update, self.end, clock, every_s)
        # The feed's thread holds the view; a model that is closed ends the subscription, and thereby both.
        self._end_feed = weakref.finalize(followed, self._feed.close)

    def close(self) -> None:
        """Follow no longer, and take the view off the page. May be called twice."""
        self._end_feed()
        super().close()

    def stop(self) -> None:
        """Follow no longer; the last drawing stays on the page. May be called twice."""
        self._end_feed()

    def end(self) -> None:
        """Draw what lasts, and say that nothing follows."""
        if not self.ended:
            self._is_last = True
            self._update()
        super().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _add(self, event: Event) -> None:
        """Take an event; a view that only looks at the present state needs none."""

    def _draw(self) -> None:
        raise NotImplementedError

    def _update(self) -> bool:
        with contextlib.suppress(ConnectionError):  # the front end has gone
            self._draw()
        return not self._has_ended()

    def _has_ended(self) -> bool:
        """Whether what the view follows has ended without ending the subscription."""
        return False

    def _show(self, text: str, svg: str, rows: Callable[[], Sequence[Sequence[str]]]) -> None:
        self.rows_now = rows
        with self.hold_sync():
            self.summary = text
            self.svg = svg


class PipelineView(_View):
    """The blocks of a model, the servers that hold them, and the route of the session that ran last.

    Steps flow through as they finish, each hop with the time of its queue, its computation and its network.
    A lost server turns red before its replacement takes its place.

    Example::

        view = PipelineView(model, swarm=swarm)     # with buttons that kill, stop and add servers
        view

    The text of an answer that the view is told of, as by `model.generate(…, view=view)`, stands below the
    drawing. Each of the last 200 tokens tells its time at every server; slow ones stand on amber or red.

    Args:
        model: whose events are followed.
        swarm: the local swarm of its servers, if it is one: the view then has buttons for them.
        session: follow this session only; the one whose step came last if not given.
        chances: tell the probability of each token, too, with the five likeliest in its place, and colour by
            it. All logits of each token are computed then, and no tokens are drafted ahead.
    """

    def __init__(
        self,
        model: SwarmModel,
        swarm: LocalSwarm | None = None,
        session: Session | None = None,
        clock: Clock = SYSTEM_CLOCK,
        *,
        chances: bool = False,
    ) -> None:
        self._log = PipelineLog()
        self._tail: TokenTail | None = None
        self._chances = chances
        self._model = weakref.ref(model)
        self._tokenizer: Any = None
        self._session = session
        self._swarm = swarm
        self._buttons = _ServerButtons(swarm) if swarm is not None else None
        self._client = model.connection.client
        super().__init__(model, model.subscribe(_CAPACITY), clock)
        if self._buttons is not None:
            self._buttons.attach(self)

    def follow_tokens(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a call of `generate()` with which the view shows the text of its answer.

        Where there are several answers at a time, only their way through the swarm is shown.
        """
        model = self._model()
        if model is None or not _is_one_answer(model, options):
            return options
        if self._tokenizer is None:
            try:
                self._tokenizer = model.tokenizer()
            except ModelError:  # the checkpoint has none
                return options
        tokenizer = self._tokenizer

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(tokens))

        added: dict[str, Any] = {}
        drafts = any(options.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))
        recorder = ChanceRecorder(_LIKELIEST, decode) if self._chances and not drafts else None
        if recorder is not None:  # it follows the tokens one by one
            added["logits_processor"] = [recorder, *(options.get("logits_processor") or ())]
            added["speculation"] = "off"
        self._tail = TokenTail(decode, options.get("streamer"), recorder)
        return options | added | {"streamer": self._tail}

    def _add(self, event: Event) -> None:
        if self._session is None or event.owner == self._session.chain.owner:
            self._log.add(event)

    def _draw(self) -> None:
        now = self._clock.time()
        reference = self._client.model
        servers = server_pictures(self._client.known.servers())
        if self._swarm is not None:  # which knows before any client does that a server has ended
            ended = {each.peer_id for each in self._swarm.pictures() if each.state == "lost"}
            servers = [replace(each, state="lost") if each.peer_id in ended else each for each in servers]
        picture = self._log.picture(reference.name, reference.num_blocks, servers, now, self._is_last)
        moving = self._log.is_active(now) and not self._is_last
        phase = (now % _TOKEN_LAP_S) / _TOKEN_LAP_S if moving else None
        with self.hold_sync():
            self._show(pipeline_text(picture), pipeline_svg(picture, phase), lambda: pipeline_rows(picture))
            if self._tail is not None:
                self.tokens = tokens_html("", self._tail.pictures(self._log.steps()))
        if self._buttons is not None:
            self._buttons.refresh(self)


def _is_one_answer(model: SwarmModel, options: dict[str, Any]) -> bool:
    """Whether a call of `generate()` makes one answer, token by token."""
    prompts = [options[name] for name in ("inputs", "input_ids") if options.get(name) is not None]
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    counts = (options.get(name) or getattr(config, name, None) for name in names)
    return all(each.shape[0] == 1 for each in prompts) and all((count or 1) == 1 for count in counts)


class SwarmView(_View):
    """Which servers have which blocks, how many have each block, and what is missing; for a model or a swarm.

    Args:
        of: a model, whose view of the swarm is drawn, or a `LocalSwarm`, which adds buttons that kill, stop
            and add servers.
        every_s: seconds between two looks; a server that a session of the model loses is seen at once.
    """

    def __init__(self, of: SwarmModel | LocalSwarm, every_s: float = 1.0) -> None:
        self._swarm = of if isinstance(of, LocalSwarm) else None
        self._buttons = _ServerButtons(of) if isinstance(of, LocalSwarm) else None
        if isinstance(of, LocalSwarm):
            news = EventStream().subscribe()  # its servers have no stream in common: it is looked at only
        else:
            self._client = of.connection.client
            news = of.subscribe(_CAPACITY, PeerLost, PeerReplaced, Rerouted)
        super().__init__(of, news, every_s=every_s)
        if self._buttons is not None:
            self._buttons.attach(self)

    def _draw(self) -> None:
        if self._swarm is not None:
            name, num_blocks = self._swarm.checkpoint.name, self._swarm.checkpoint.num_blocks
            servers = self._swarm.pictures()
        else:
            name, num_blocks = self._client.model.name, self._client.model.num_blocks
            servers = server_pictures(self._client.known.servers())
        drawn = swarm_svg(name, num_blocks, servers)
        self._show(swarm_text(name, num_blocks, servers), drawn, lambda: swarm_rows(servers))
        if self._buttons is not None:
            self._buttons.refresh(self)

    def _has_ended(self) -> bool:
        return self._swarm is not None and self._swarm.closed


class SessionTimeline(_View):
    """The last steps of a session, one below the other: where the time of each went, hop by hop.

    Args:
        of: a session, or a model, of which the session is followed whose step came last.
        model: the session's model, where `of` is a session.
        last: how many steps are drawn.
    """

    def __init__(
        self,
        of: SwarmModel | Session,
        model: SwarmModel | None = None,
        last: int = 30,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._owner = getattr(getattr(of, "chain", None), "owner", None)
        self._last = last
        self._log = PipelineLog()
        followed: Any = model if self._owner is not None else of
        if followed is None:
            raise UsageError("give the session's model as well: SessionTimeline(session, model)")
        for step in followed.trace:
            self._add(step)
        super().__init__(followed, followed.subscribe(_CAPACITY, StepFinished), clock)

    def _add(self, event: Event) -> None:
        if isinstance(event, StepFinished) and self._owner in (None, event.owner):
            self._log.add(event)

    def _draw(self) -> None:
        steps = self._log.steps()[-self._last :]
        self._show(timeline_text(steps), timeline_svg(steps), lambda: timeline_rows(steps))


class TrainingView(_View):
    """The loss of a training loop, its speed, and which server has done how much of the work.

    Example::

        view = TrainingView(model)
        view                                     # shown
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            view.log(loss)

        Trainer(…, callbacks=[view.callback()])  # or with transformers' Trainer
    """

    def __init__(self, model: SwarmModel, clock: Clock = SYSTEM_CLOCK) -> None:
        self._losses = LossCurve()
        self._shares: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque(maxlen=256)
        self._lost = 0
        super().__init__(model, model.subscribe(_CAPACITY, MicroBatchFinished), clock)

    def log(self, loss: Any) -> None:
        """Add the loss of one step: a number, or a tensor that holds one."""
        self._losses.add(float(loss.detach() if isinstance(loss, torch.Tensor) else loss))

    def callback(self) -> Any:
        """A `TrainerCallback` of transformers that logs the loss of a `Trainer`."""
        from transformers import TrainerCallback

        view = self

        class LogLoss(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    view.log(logs["loss"])

        return LogLoss()

    def _add(self, event: Event) -> None:
        if isinstance(event, MicroBatchFinished):
            self._shares.update(event.route)
            self._lost += event.lost
            self._recent.append((event.time, event.tokens))

    def _draw(self) -> None:
        curve = self._losses
        shares = dict(self._shares)
        picture = TrainingPicture(
            curve.points(), self._rate(), shares, self._lost, steps=curve.count, loss=curve.last
        )
        self._show(training_text(picture), training_svg(picture), lambda: training_rows(picture))

    def _rate(self) -> float:
        recent = list(self._recent)
        if len(recent) < 2 or self._clock.time() - recent[-1][0] > 5.0:
            return 0.0
        seconds = recent[-1][0] - recent[0][0]
        return sum(tokens for _, tokens in recent[1:]) / seconds if seconds > 0 else 0.0


class _ServerButtons:
    """Buttons that kill and stop each server of a local swarm, and one that adds a server."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self._swarm = swarm

    def attach(self, view: LiveDrawing) -> None:
        """Put the buttons into a view, and react to them."""
        view.on_button("kill", lambda target: self._swarm.servers[int(target)].kill())
        view.on_button("stop", lambda target: self._swarm.servers[int(target)].stop())
        view.on_button("add", lambda target: self._swarm.add_server(self._thinnest()))
        self.refresh(view)

    def refresh(self, view: LiveDrawing) -> None:
        """Offer what can be done now."""
        buttons = self._buttons(self._swarm.pictures())
        if buttons != view.buttons:
            view.buttons = buttons

    def _buttons(self, servers: Sequence[ServerPicture]) -> list[Button]:
        buttons = []
        for number, server in enumerate(servers):
            if server.state == "online":
                name = f"{server.label} [{server.blocks}]"
                kill = "End this server at once, as a crash would; the answer goes on elsewhere"
                stop = "Let this server leave in peace; its sessions move away first"
                buttons.append(
                    {"action": "kill", "target": str(number), "label": f"Kill {name}", "title": kill}
                )
                buttons.append(
                    {"action": "stop", "target": str(number), "label": f"Stop {name}", "title": stop}
                )
        add = "Start one more server, for the blocks that the fewest servers have"
        return [*buttons, {"action": "add", "target": "", "label": "Add a server", "title": add}]

    def _thinnest(self) -> tuple[int, int]:
        return least_covered(self._swarm.checkpoint.num_blocks, self._swarm.pictures())
