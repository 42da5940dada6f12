"""A model's output layer, computed by a server where that is quicker; `generate()` stays transformers' own.

During a call of `generate()` that can do with the largest logits, the output layer's `forward` asks a
server, and returns rows with NaN for what did not come. The call's logits processors are wrapped by one that
lets them see such a row only if their outcome is provably that of the complete row; otherwise it completes
the row first. Outside of `generate()`, as for a loss, the layer is computed here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from swarmkit.client.head.asker import Answer, LogitsAsker
from swarmkit.client.head.demand import LogitsDemand, demand_of
from swarmkit.client.head.rows import PartialRows, partial_rows
from swarmkit.client.head.times import HeadTimes, Way
from swarmkit.client.swarm.connection import Connection
from swarmkit.errors import PeerError, UsageError
from swarmkit.models.head.head import JointLinear
from swarmkit.net.protocol.logits_messages import MAX_LOGITS_ROWS, MAX_TOP

logger = logging.getLogger(__name__)

_PATIENCE = 2


@dataclass
class _HeadCall:
    """One call of `generate()`, in its thread.

    Attributes:
        demand: what it needs of each token; None = complete logits.
        text: of the step that transformers has prepared: `[rows, tokens]`; None = none was.
        rows: what is known of the logits of the latest step, where they are not complete.
        raw: the complete logits of the latest step, until a processor has seen them.
        asked, completed: steps for which a server told the largest logits, and how often these did not
            suffice.
    """

    demand: LogitsDemand | None = None
    text: Tensor | None = None
    rows: PartialRows | None = None
    raw: Tensor | None = None
    asked: int = 0
    completed: int = 0

    @property
    def needs_all(self) -> bool:
        """Whether the largest logits seldom suffice, so that to ask for them is in vain."""
        return self.completed > _PATIENCE + self.asked // 2


_current: ContextVar[_HeadCall | None] = ContextVar("swarmkit_head_call", default=None)


class ServedHead:
    """The output layer of one model, here and at servers. Used by any number of threads."""

    def __init__(self, model: PreTrainedModel, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.client.settings.head
        self._clock = connection.client.clock
        found: Any = model.get_output_embeddings()
        self._layer: nn.Linear | None = found if type(found) in (nn.Linear, JointLinear) else None
        self._as_loaded = 0 if self._layer is None else self._layer.weight._version
        self._asker: LogitsAsker | None = None
        self._lock = threading.Lock()
        self.times = HeadTimes()
        self._is_plain: bool | None = None
        """Whether the model returns the output layer's logits as they are; None = not seen yet."""

    # ------------------------------------------------------------------ a call of generate()

    @contextmanager
    def of_call(self, asks: bool) -> Iterator[None]:
        """Say whether servers compute the output layer inside the `with` block, which is a call of
        `generate()`. What holds for a call around it, as for that of a draft model, does not hold in it.

        Args: asks: whether they do.
        """
        token = _current.set(_HeadCall() if asks else None)
        try:
            yield
        finally:
            _current.reset(token)

    def is_offered(self, model: PreTrainedModel) -> bool:
        """Whether a server may compute the output layer of `model`, the one that this is the head of."""
        layer = self._layer
        if self._settings.head == "local" or layer is None:
            return False
        if not any(server.head_ms for server in self._connection.client.known.servers()):
            return False
        weight = layer.weight
        if model.get_output_embeddings() is not layer or weight.requires_grad:
            return False  # what the user has put there, or trains, no server has
        if weight._version != self._as_loaded:
            return False
        with self._lock:
            if self._asker is None:
                self._asker = LogitsAsker(self._connection.client, weight.shape[0])
                layer.forward = self._forward  # type: ignore[method-assign]
        return True

    def wrapped(self, processors: LogitsProcessorList, config: GenerationConfig) -> LogitsProcessorList:
        """The processors that `generate()` has prepared, or one that stands for all of them."""
        call = _current.get()
        if call is None:
            return processors
        call.demand = demand_of(processors, config)
        if call.demand is None:
            return processors
        return LogitsProcessorList([_Completing(self, call, processors)])

    def prepared(self, text: Tensor) -> None:
        """transformers has prepared a step behind a text `[rows, tokens]`."""
        call = _current.get()
        if call is not None:
            call.text = text

    # ------------------------------------------------------------------ the layer

    def _forward(self, hidden: Tensor) -> Tensor:
        """What the output layer of the model does, in the place of `nn.Linear.forward`."""
        layer = self._layer
        assert layer is not None
        call = _current.get()
        text = None if call is None else call.text
        if call is None or text is None or torch.is_grad_enabled():
            return nn.Linear.forward(layer, hidden)
        call.text = call.rows = call.raw = None
        flat = hidden.reshape(-1, hidden.shape[-1])
        if not 1 <= len(flat) <= MAX_LOGITS_ROWS:
            return nn.Linear.forward(layer, hidden)
        shape = (*hidden.shape[:-1], layer.weight.shape[0])
        demand = call.demand
        if demand is None or self._is_plain is False or call.needs_all:
            return self.complete(flat).reshape(shape)
        if self._is_plain is None:
            call.raw = self._local(flat)
            return call.raw.reshape(shape)
        call.rows = self._partial(flat, demand, text)
        if call.rows is None:
            return self._local(flat).reshape(shape)
        call.asked += 1
        return call.rows.padded(shape[-1]).reshape(shape)

    def _local(self, flat: Tensor) -> Tensor:
        assert self._layer is not None
        began_at = self._clock.now()
        logits = nn.Linear.forward(self._layer, flat)
        if flat.device.type == "cpu":
            self._note("local", flat, self._clock.now() - began_at)
        return logits

    def complete(self, flat: Tensor) -> Tensor:
        """All logits `[rows, vocabulary]` of hidden states `[rows, hidden]`, wherever they are quicker."""
        if flat.dtype == torch.float32 and self._wants("complete", flat):
            answer = self._ask("complete", flat, 0, 1.0)
            if answer is not None and not self._is_false(answer, flat):
                return answer.logits.values.to(flat)
        return self._local(flat)

    def _partial(self, flat: Tensor, demand: LogitsDemand, text: Tensor) -> PartialRows | None:
        """What a server tells of the rows, with the logits that editors need; None = compute all here."""
        layer = self._layer
        assert layer is not None
        vocabulary = layer.weight.shape[0]
        top = demand.top(self._settings.head_top)
        named = demand.named_tokens(text)
        named = named[(named >= 0) & (named < vocabulary)]
        # To compute many logits of their own here would take as long as all of them.
        if top > min(MAX_TOP, vocabulary // 2) or 4 * len(named) > vocabulary:
            return None
        if not self._wants("top", flat):
            return None
        answer = self._ask("top", flat, top, demand.temperature)
        if answer is None:
            return None
        rows = partial_rows(layer, flat, answer.logits, named)
        client = self._connection.client
        share = client.settings.checks.check_share
        is_false = rows.excess() > 1.0
        if not is_false and share and client.chance() < share:
            is_false = rows.is_contradicted_by(self._local(flat), demand.temperature)
        if is_false:
            self._convict(answer)
            return None
        return rows

    def _is_false(self, answer: Answer, flat: Tensor) -> bool:
        """Whether complete logits are not those of this model, as far as the largest of them show."""
        assert self._layer is not None
        values = answer.logits.values
        told = type(answer.logits)(*values.topk(min(8, values.shape[1]), dim=1), answer.logits.log_sum_exp)
        rows = partial_rows(self._layer, flat, told, torch.empty(0, dtype=torch.int64))
        is_false = rows.excess() > 1.0
        client = self._connection.client
        share = client.settings.checks.check_share
        if not is_false and share and client.chance() < share:
            apart = (self._local(flat).cpu() - values).abs().amax(dim=1)
            is_false = bool((apart > rows.slack).any())
        if is_false:
            self._convict(answer)
        return is_false

    # ------------------------------------------------------------------ servers

    def _wants(self, way: Way, flat: Tensor) -> bool:
        """Whether to ask a server for these rows."""
        assert self._asker is not None
        asker = self._asker
        offers = asker.offers()
        if not offers:
            return False
        if self._settings.head == "remote":
            return True
        with self._lock:
            return self.times.is_quicker(way, len(flat), asker.expected_s(offers[0]), self._clock.now())

    def _ask(self, way: Way, flat: Tensor, top: int, temperature: float) -> Answer | None:
        """A server's answer; None if none came."""
        assert self._asker is not None
        began_at = self._clock.now()
        hidden = flat.detach().to("cpu", torch.float32).contiguous()
        try:
            answer: Answer = self._connection.call(self._asker.ask, hidden, top, temperature)
        except PeerError as error:
            logger.info("no server computed the output layer, which is done here now: %s", error)
            with self._lock:
                now = self._clock.now()
                self.times.note_failure(way, len(flat), now - began_at, now)
            return None
        self._note(way, flat, answer.seconds)
        return answer

    def _convict(self, answer: Answer) -> None:
        assert self._asker is not None
        asker, server = self._asker, answer.server
        logger.warning("%s told wrong logits, and is left aside", server.label)
        self._connection.call_soon(lambda: asker.convict(server))

    def _note(self, way: Way, flat: Tensor, seconds: float) -> None:
        with self._lock:
            self.times.note(way, len(flat), seconds, self._clock.now())

    def saw(self, raw: Tensor, scores: Tensor) -> None:
        """Note what the model made of complete logits of the output layer: only equal ones can be served."""
        expected = raw[-len(scores) :].to(scores.dtype)
        is_plain = expected.shape == scores.shape and torch.equal(expected, scores)
        if self._is_plain is None:
            self._is_plain = is_plain


class _Completing(LogitsProcessor):  # type: ignore[misc]
    """Stands for the processors of a call, and lets them see no row that is not known well enough."""

    def __init__(self, head: ServedHead, call: _HeadCall, processors: LogitsProcessorList) -> None:
        self._head = head
        self._call = call
        self._processors = processors

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        call, rows = self._call, self._call.rows
        if call.raw is not None:
            if len(call.raw) == len(scores):
                self._head.saw(call.raw, scores)
            call.raw = None
        if rows is None or not bool(scores.isnan().any()):
            return self._processors(input_ids, scores)
        first = rows.place_of(scores)
        if first is None:
            raise UsageError(
                "the model changes the logits of its output layer, which a server computed; "
                "load it with ClientSettings().replace(head='local')"
            )
        assert call.demand is not None

        def complete(hidden: Tensor) -> Tensor:
            call.completed += 1
            return self._head.complete(hidden)

        return rows.processed(call.demand, self._processors, input_ids, scores, first, complete)
