"""One token each of several sessions, as work that an accelerator has on record.

Handing an accelerator the few hundred small pieces of work that make up a token takes Python several times as
long as they take the accelerator. So a pass over single tokens is recorded once (a CUDA graph) and from then
on started as one piece. A record has fixed shapes and addresses: so many rows, each a session in its seat
(see `seats`), and attention over so many tokens of each; what is not there yet is masked::

    places   [ 17 | 403 | -- ]      what each row's token is the how-manieth of
    rows     a, b, and one that has no token this time: it computes something that nobody looks at

There is a record for each of a few sizes. Blocks that cannot be recorded, and steps of another kind, run as
they do without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.execution.packed import BatchedKeys, PackedBatch, PackedView, StepPart
from swarmkit.models.execution.transfer import to_device
from swarmkit.models.kv.static_slots import StaticSlots

logger = logging.getLogger(__name__)

_RECORDING = threading.Lock()
"""Who begins to record waits for all of the accelerator, which fails while another recording is under way."""

_LEAST_TOKENS = 256
"""Of the attention of the smallest record; each further size is twice as long."""


class _Rows(PackedBatch):
    """The first rows of the seats, each with one token."""

    side_by_side = True

    def __init__(self, seats: StaticSlots, rows: int, tokens: int, inputs: _Inputs, attention: str) -> None:
        super().__init__([(rows, 1)], attention)
        self._seats = seats
        self._rows = rows
        self._tokens = tokens
        self._inputs = inputs
        self._mask: Tensor | None = None

    def see(self) -> None:
        """At the beginning of a pass: let each row see its own tokens only."""
        hidden = self._inputs.hidden
        unseen = torch.arange(self._tokens, device=hidden.device) > self._inputs.places[:, None]
        least = torch.finfo(hidden.dtype).min
        mask = torch.zeros(unseen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(unseen, least)
        self._mask = mask[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write [1, heads, rows, dim] to the rows' places; returns all that the rows hold."""
        held = []
        for pool, new in zip(self._seats.pool(layer_idx), (keys, values), strict=True):
            pool[self._inputs.targets, :, self._inputs.places] = new[0].transpose(0, 1)
            held.append(pool[: self._rows, :, : self._tokens])
        return BatchedKeys(self, held[:1]), BatchedKeys(self, held[1:])

    def mask(self, number: int, block: int) -> Tensor | None:
        return self._mask

    def places(self) -> Tensor:
        return self._inputs.places


class _Inputs:
    """What a record reads anew each time."""

    def __init__(self, rows: int, like: Tensor, spare: int) -> None:
        device = like.device
        self.hidden = torch.zeros(rows, like.shape[-1], dtype=like.dtype, device=device)
        self._numbers = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.places, self.targets = self._numbers
        self.targets.fill_(spare)
        self._spare = spare

    def set(self, parts: Sequence[StepPart], rows: Sequence[int]) -> None:
        """The parts' tokens, each in its row; rows without one write to the spare row."""
        places, targets = [0] * len(self.hidden), [self._spare] * len(self.hidden)
        for part, row in zip(parts, rows, strict=True):
            places[row], targets[row] = part.cache.tokens, row
            self.hidden[row].copy_(part.hidden[0, 0])
        self._numbers.copy_(to_device(torch.tensor([places, targets]), self._numbers.device))


class _CudaGraph:
    """A pass over so many rows and tokens, recorded when it is first run."""

    def __init__(self, view: PackedView, seats: StaticSlots, rows: int, tokens: int, like: Tensor) -> None:
        self.inputs = _Inputs(rows, like, seats.rows)
        self._pack = _Rows(seats, rows, tokens, self.inputs, view.attention)
        self._view = view
        self._run = self._pass if like.device.type == "cpu" else self._record(like.device)

    def __call__(self) -> Tensor:
        """[rows, hidden]; the same memory each time."""
        return self._run()

    def _pass(self) -> Tensor:
        self._pack.see()
        return self._view.run(self.inputs.hidden, self.inputs.places, self._pack)

    def _record(self, device: torch.device) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            self._pass()  # libraries choose their kernels and take their memory at the first call
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        number = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[number]
        with _RECORDING:
            # Random numbers belong to a recording until it ends, and for good if it fails: whoever else asks
            # for some is refused. None are recorded here, so it is given a copy.
            everybodys = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                # A recording that fails stays at its stream: hence the first of these. Other threads of the
                # process may use the accelerator meanwhile.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(device)),
                    torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
                ):
                    generator.graphsafe_set_state(everybodys)
                    output = self._pass()
            finally:
                generator.graphsafe_set_state(everybodys)

        def run() -> Tensor:
            graph.replay()
            return output

        return run


class CudaGraphs:
    """The records of some blocks of a stage."""

    def __init__(self, view: PackedView, seats: StaticSlots) -> None:
        self._view = view
        self._seats = seats
        self._records: dict[tuple[int, int], _CudaGraph] = {}
        self._works = True

    def run(self, parts: Sequence[StepPart]) -> list[Tensor] | None:
        """Run one token each of sessions of these blocks, and write it to their caches.

        Args: parts: checked, of the blocks' device and dtype, with hidden states [1, 1, hidden], nothing
            masked, counted positions, no adapter, and something in the cache.

        Returns:
            [1, 1, hidden] for each; None if that cannot be: then nothing has happened.
        """
        if not self._works or len(parts) > self._seats.rows:
            return None
        rows = []
        for part in parts:
            seat = part.cache.acquire_slot(self._seats)
            if seat is None or part.cache.tokens >= seat.length:
                return None
            rows.append(seat.row)
        size = (
            _power(max(rows) + 1, 1, self._seats.rows),
            _power(max(part.cache.tokens for part in parts) + 1, _LEAST_TOKENS, self._seats.length),
        )
        try:
            record = self._records.get(size)
            if record is None:
                record = self._records[size] = _CudaGraph(self._view, self._seats, *size, parts[0].hidden)
            record.inputs.set(parts, rows)
            out = record()
        except Exception:
            logger.warning("single tokens cannot be recorded here, and run without", exc_info=True)
            self._works = False
            return None
        return [out[row].clone()[None, None] for row in rows]


def _power(wanted: int, least: int, most: int) -> int:
    """The least power-of-two multiple of `least` that is no less than what is wanted, but at most `most`."""
    size = least
    while size < wanted:
        size *= 2
    return min(size, most)
