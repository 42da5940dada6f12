"""Blocks over whole sequences, without a cache: forward, or forward and back, a few blocks at a time.

For training. What runs in pieces can be interrupted between them by whatever is more urgent::

    forward:   x ─[blocks]─> ─[blocks]─> ─[blocks]─> output
    backward:  x ─[blocks]─> ─[blocks]─> ─[blocks]─> (kept: the graph of each piece)
               gradient <─[graph]─ <─[graph]─ <─[graph]─ gradient of the output

A forward pass can keep its graph, and go back later. The numbers do not depend on where the cuts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmkit.errors import UsageError
from swarmkit.models.adapters.adapter import Adapter, Tensors, extent
from swarmkit.models.execution.stage import Stage


@dataclass(frozen=True)
class FullSequences:
    """What blocks [start, stop) are given, from the first token on.

    Attributes:
        hidden: [batch, tokens, hidden].
        attention_mask: [batch, tokens], false or 0 at padding; None = no padding.
        position_ids: [batch, tokens]; None = counted from 0.
        states: the outputs of all blocks are wanted, [blocks, batch, tokens, hidden].
    """

    hidden: Tensor
    start: int
    stop: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    states: bool = False

    @property
    def output_shape(self) -> tuple[int, ...]:
        shape = tuple(self.hidden.shape)
        return (self.stop - self.start, *shape) if self.states else shape

    def rows(self, low: int, high: int) -> FullSequences:
        """Some of the sequences."""
        mask, positions = self.attention_mask, self.position_ids
        return FullSequences(
            self.hidden[low:high],
            self.start,
            self.stop,
            None if mask is None else mask[low:high],
            None if positions is None else positions[low:high],
            self.states,
        )


@dataclass
class _Piece:
    """A piece that was run with its graph kept: its input, and the outputs that gradients come in at."""

    blocks: int
    given: Tensor
    outputs: list[Tensor]
    values: Tensor | None
    """Of the adapter in these blocks, as a leaf of the graph."""
    place: tuple[int, int]
    """Where they begin and end among those of the whole adapter."""


class _SavedInputs:
    """Counts what a graph keeps: tensors that autograd saves, each memory once, and no weights."""

    def __init__(self, weights: frozenset[int]) -> None:
        """Args: weights: addresses of what is there anyway."""
        self.nbytes = 0
        self._known = set(weights)

    def counted(self) -> AbstractContextManager[object]:
        """Graphs that are made in this context count."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in self._known:
                self._known.add(memory.data_ptr())
                self.nbytes += memory.nbytes()
        return tensor.detach()  # an output that its own graph held would never be freed


class FullSequencePass:
    """One pass over the blocks: `advance` until nothing is left, then `result`.

    Belongs to one thread, like the stage.
    """

    def __init__(
        self,
        stage: Stage,
        inputs: FullSequences,
        gradient: Tensor | None = None,
        adapter: Adapter | None = None,
        trains: bool = False,
        keeps: bool = False,
    ) -> None:
        """Args:
        gradient: with respect to the output, of its shape; then the pass goes back as well.
        adapter: for these blocks, at least.
        trains: the gradient with respect to the adapter's values is wanted, too.
        keeps: without a gradient: keep what `go_back` needs.

        Raises:
            UsageError: shapes do not fit each other or the model, or the blocks are not in this stage.
        """
        stage.check_whole(
            inputs.hidden, inputs.start, inputs.stop, inputs.attention_mask, inputs.position_ids
        )
        self._stage = stage
        self._inputs = inputs
        self._position = inputs.start
        self._states: list[Tensor] = []
        self._pieces: list[_Piece] = []
        self._goes_back = False
        self._has_graph = keeps or gradient is not None
        self._saved = _SavedInputs(stage.weights) if keeps else None
        self._adapter = None if adapter is None else adapter.within(inputs.start, inputs.stop)
        self.adapter_gradient: Tensor | None = None
        """With respect to the adapter's values for these blocks, if wanted, when nothing is left."""
        if trains and self._adapter is not None:
            self.adapter_gradient = torch.zeros_like(self._adapter.values, dtype=torch.float32)
        with self._mode():
            # A copy: what was made in inference mode may not be used where there are gradients.
            self._hidden = inputs.hidden.to(stage.device, stage.dtype).clone()
        self._gradients: list[Tensor] = []
        """With respect to the outputs wanted, first to last."""
        self._back: Tensor | None = None
        if gradient is not None:
            self.go_back(gradient)

    def go_back(self, gradient: Tensor) -> None:
        """From now on, there is a way back to go as well; once, by a pass that keeps what it needs for that.

        Raises:
            UsageError: the gradient has not the output's shape.
        """
        if tuple(gradient.shape) != self._inputs.output_shape:
            raise UsageError(
                f"The gradient is {list(self._inputs.output_shape)} as the output, "
                f"not {list(gradient.shape)}."
            )
        assert self._has_graph
        with self._mode():
            at_device = gradient.to(self._stage.device, self._stage.dtype).clone()
            self._gradients = list(at_device) if self._inputs.states else [at_device]
        self._goes_back = True

    @property
    def kept_bytes(self) -> int:
        """What is kept for the way back takes, besides the weights."""
        return 0 if self._saved is None else self._saved.nbytes

    def forget(self) -> None:
        """Keep nothing for a way back, now and from now on; the pass is a forward pass only."""
        with self._mode():
            self._hidden = self._hidden.detach()
        self._pieces, self._states = [], [state.detach() for state in self._states]
        self._has_graph, self._saved = False, None

    @property
    def blocks_left(self) -> int:
        """How many blocks forward are still to be run."""
        return self._inputs.stop - self._position

    @property
    def left(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self.blocks_left or (self._goes_back and self._pieces))

    def advance(self, blocks: int) -> int:
        """Run the next piece: up to so many blocks forward, or back through the last piece that was.

        Returns: how many blocks that was.
        """
        with self._mode():
            if self.blocks_left:
                return self._forward(min(blocks, self.blocks_left))
            return self._backward(self._pieces.pop())

    def result(self) -> Tensor:
        """The output; or the gradient with respect to the input [batch, tokens, hidden]."""
        if self._goes_back:
            assert self._back is not None
            return self._back
        return (torch.stack(self._states) if self._inputs.states else self._hidden).detach()

    def _forward(self, blocks: int) -> int:
        low, high = self._position, self._position + blocks
        if self._has_graph:
            self._hidden = self._hidden.detach().requires_grad_()
        given = self._hidden
        outputs: list[Tensor] = []
        tensors, values, place = self._tuned(low, high)
        with nullcontext() if self._saved is None else self._saved.counted():
            for start, stop in self._cuts(low, high):
                self._hidden = self._stage.run_whole(
                    self._hidden,
                    start,
                    stop,
                    self._inputs.attention_mask,
                    self._inputs.position_ids,
                    tensors,
                )
                outputs.append(self._hidden)
        if self._has_graph:
            self._pieces.append(_Piece(blocks, given, outputs, values, place))
        if self._inputs.states and not self._goes_back:
            self._states += [output.detach() for output in outputs]
        self._position = high
        return blocks

    def _tuned(self, low: int, high: int) -> tuple[Tensors | None, Tensor | None, tuple[int, int]]:
        """The adapter's part for some blocks: by place, as a leaf if it is trained, and where it lies."""
        if self._adapter is None:
            return None, None, (0, 0)
        if self.adapter_gradient is None:
            return self._adapter.tensors, None, (0, 0)
        part = self._adapter.within(low, high)
        values = part.values.detach().requires_grad_()
        place = extent(self._adapter.slots, low, high)
        return Tensors.of(part.spec, part.slots, values), values, place

    def _cuts(self, low: int, high: int) -> Sequence[tuple[int, int]]:
        """One by one if their outputs are wanted."""
        return [(block, block + 1) for block in range(low, high)] if self._inputs.states else [(low, high)]

    def _backward(self, piece: _Piece) -> int:
        wanted = len(piece.outputs) if self._inputs.states else int(self._back is None)
        own, self._gradients = self._take(wanted)
        outputs, gradients = piece.outputs[-len(own) :] if own else [], own
        if self._back is not None:
            outputs, gradients = [*outputs, piece.outputs[-1]], [*gradients, self._back]
        if piece.values is None or self.adapter_gradient is None:
            (self._back,) = torch.autograd.grad(outputs, piece.given, gradients)
            return piece.blocks
        self._back, of_values = torch.autograd.grad(
            outputs, [piece.given, piece.values], gradients, allow_unused=True
        )
        if of_values is not None:
            low, high = piece.place
            self.adapter_gradient[low:high] = of_values
        return piece.blocks

    def _take(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the last so many outputs, and the rest."""
        at = len(self._gradients) - count
        return self._gradients[at:], self._gradients[:at]

    def _mode(self) -> AbstractContextManager[object]:
        if not self._has_graph:
            return torch.inference_mode()
        modes = ExitStack()
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        return modes
