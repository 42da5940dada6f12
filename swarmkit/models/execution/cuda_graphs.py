"""Single tokens of several sessions as CUDA graphs.

Launching the few hundred kernels of a token takes Python several times as long as they take the accelerator.
So a pass over single tokens is recorded once, and from then on launched as one graph. A graph has fixed
shapes and addresses: so many rows, each a session in its static slot (see `static_slots`), and attention over
so many tokens of each. Tokens that are not there yet are masked::

    positions   [ 17 | 403 | -- ]      position of each row's token within its session
    rows        a, b, and one that has no token this time, whose output is not used

There is a graph for each of a few sizes. Blocks that cannot be recorded, and other steps, run without graphs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.execution.packed import BatchedKeys, PackedBatch, PackedView, StepPart
from swarmkit.models.execution.view import View, to_device
from swarmkit.models.kv.static_slots import StaticSlots

logger = logging.getLogger(__name__)

_RECORDING = threading.Lock()
"""Held while a graph is recorded: beginning to record waits for all work of the accelerator, which fails
while another graph is being recorded."""

_LEAST_TOKENS = 256
"""Tokens of the attention of the smallest graph; each larger size has twice as many."""


class SlotBatch(PackedBatch):
    """The first rows of the static slots, each with one token."""

    side_by_side = True

    def __init__(self, slots: StaticSlots, rows: int, tokens: int, inputs: _Inputs, attention: str) -> None:
        """Args: tokens: of each slot that attention looks at."""
        super().__init__([(rows, 1)], attention)
        self._slots = slots
        self._rows = rows
        self._tokens = tokens
        self._inputs = inputs
        self._mask: Tensor | None = None

    def make_mask(self) -> None:
        """At the beginning of a pass: let each row attend to its own tokens only."""
        hidden = self._inputs.hidden
        unseen = torch.arange(self._tokens, device=hidden.device) > self._inputs.positions[:, None]
        least = torch.finfo(hidden.dtype).min
        mask = torch.zeros(unseen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(unseen, least)
        self._mask = mask[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write `[1, heads, rows, dim]` to the rows' positions, and return all that the rows hold."""
        held = []
        for pool, new in zip(self._slots.pool(layer_idx), (keys, values), strict=True):
            pool[self._inputs.slots, :, self._inputs.positions] = new[0].transpose(0, 1)
            held.append(pool[: self._rows, :, : self._tokens])
        return BatchedKeys(self, held[:1]), BatchedKeys(self, held[1:])

    def mask(self, number: int, block: int) -> Tensor | None:
        return self._mask

    def positions(self) -> Tensor:
        return self._inputs.positions


class _Inputs:
    """What a graph reads anew each time it is launched."""

    def __init__(self, rows: int, like: Tensor, spare: int) -> None:
        device = like.device
        self.hidden = torch.zeros(rows, like.shape[-1], dtype=like.dtype, device=device)
        self._numbers = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.positions, self.slots = self._numbers
        self.slots.fill_(spare)
        self._spare = spare

    def set(self, parts: Sequence[StepPart], rows: Sequence[int]) -> None:
        """Put each part's token into its row; rows without one write to the spare slot."""
        positions, slots = [0] * len(self.hidden), [self._spare] * len(self.hidden)
        for part, row in zip(parts, rows, strict=True):
            positions[row], slots[row] = part.cache.tokens, row
            self.hidden[row].copy_(part.hidden[0, 0])
        self._numbers.copy_(to_device(torch.tensor([positions, slots]), self._numbers.device))


class _CudaGraph:
    """A pass over so many rows and tokens, recorded when it is first run; on a CPU it is not recorded."""

    def __init__(self, view: PackedView, slots: StaticSlots, rows: int, tokens: int, like: Tensor) -> None:
        self.inputs = _Inputs(rows, like, slots.rows)
        self._batch = SlotBatch(slots, rows, tokens, self.inputs, view.attention)
        self._view = view
        self._launch = self._pass if like.device.type == "cpu" else self._record(like.device)

    def launch(self) -> Tensor:
        """Run the pass; returns `[rows, hidden]`, in the same memory each time."""
        return self._launch()

    def _pass(self) -> Tensor:
        self._batch.make_mask()
        return self._view.run(self.inputs.hidden, self.inputs.positions, self._batch)

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
            # While a graph is recorded, the generator of random numbers belongs to it, and for good if that
            # fails: all others that want some are refused. None are recorded here, so it is given a copy.
            shared_state = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                # A recording that fails leaves its stream as the current one: hence the first of these. Other
                # threads of the process may use the accelerator meanwhile.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(device)),
                    torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
                ):
                    generator.graphsafe_set_state(shared_state)
                    output = self._pass()
            finally:
                generator.graphsafe_set_state(shared_state)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class CudaGraphs:
    """The CUDA graphs of some blocks of a stage.

    Attributes:
        works: False once recording has failed; then there are none.
    """

    def __init__(self, view: PackedView, slots: StaticSlots) -> None:
        self._view = view
        self._slots = slots
        self._graphs: dict[tuple[int, int], _CudaGraph] = {}
        self.works = True

    def run(self, parts: Sequence[StepPart]) -> list[Tensor] | None:
        """Run one token each of sessions of these blocks, and write it to their caches.

        Args: parts: checked, of the blocks' device and dtype, with hidden states `[1, 1, hidden]`, nothing
            masked, counted positions, no adapter, and something in the cache.

        Returns:
            `[1, 1, hidden]` for each; None if that cannot be: then nothing has happened.
        """
        if not self.works or len(parts) > self._slots.rows:
            return None
        rows = []
        for part in parts:
            slot = part.cache.acquire_slot(self._slots)
            if slot is None or part.cache.tokens >= slot.length:
                return None
            rows.append(slot.row)
        size = (
            _power(max(rows) + 1, 1, self._slots.rows),
            _power(max(part.cache.tokens for part in parts) + 1, _LEAST_TOKENS, self._slots.length),
        )
        try:
            graph = self._graphs.get(size)
            if graph is None:
                graph = self._graphs[size] = _CudaGraph(self._view, self._slots, *size, parts[0].hidden)
            graph.inputs.set(parts, rows)
            out = graph.launch()
        except Exception:
            logger.warning(
                "single tokens cannot be recorded here, and run without CUDA graphs", exc_info=True
            )
            self.works = False
            self._graphs.clear()
            return None
        return [out[row].clone()[None, None] for row in rows]


def _power(wanted: int, least: int, most: int) -> int:
    """The smallest power-of-two multiple of `least` that is at least `wanted`, but at most `most`."""
    size = least
    while size < wanted:
        size *= 2
    return min(size, most)


class StageGraphs:
    """The CUDA graphs of all runs of blocks of a stage, and the static slots that they share.

    Attributes:
        work: False once no blocks could be recorded; then there are none, and the slots are released.
    """

    def __init__(self, sessions: int, tokens: int) -> None:
        """Args: see `Stage.enable_cuda_graphs`."""
        self._slots = StaticSlots(sessions, tokens)
        self._of_blocks: dict[tuple[int, int], CudaGraphs] = {}
        self.work = True

    def run(
        self, blocks: tuple[int, int], view: PackedView, parts: Sequence[StepPart]
    ) -> list[Tensor] | None:
        """See `CudaGraphs.run`. The caches hold the tokens afterwards."""
        graphs = self._of_blocks.get(blocks)
        if graphs is None:
            graphs = self._of_blocks[blocks] = CudaGraphs(view, self._slots)
        outputs = graphs.run(parts)
        if outputs is not None:
            for part in parts:
                part.cache.before_step(1)
                part.cache.after_step(part.hidden, None)
        elif not any(graphs.works for graphs in self._of_blocks.values()):
            self.work = False
            self._slots.release()
            for part in parts:
                part.cache.leave_slot()
        return outputs


def is_next_token(part: StepPart, view: View) -> bool:
    """Whether it is one more token of one row that attends to all before it, without mask or adapter."""
    return (
        part.hidden.shape[:2] == (1, 1)
        and part.attention_mask is None
        and part.position_ids is None
        and part.cache.adapter is None
        and part.cache.tokens > 0
        and view.needs_no_mask(part.hidden, part.cache.tokens)
    )
