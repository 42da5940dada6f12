"""Blocks over full sequences, without a cache: forward, or forward and backward, a few blocks at a time.

This is what training runs. Between two pieces the engine runs whatever is more urgent::

    forward:   x ─[blocks]─> ─[blocks]─> ─[blocks]─> output
    backward:  x ─[blocks]─> ─[blocks]─> ─[blocks]─> (the graph of each piece is kept)
               gradient <─[graph]─ <─[graph]─ <─[graph]─ gradient of the output

A forward pass can keep its graph, and run backward later. The numbers do not depend on where the cuts are.
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
    """The inputs of blocks [start, stop), from the first token on.

    Attributes:
        hidden: [batch, tokens, hidden].
        attention_mask: [batch, tokens], false or 0 at padding; None = no padding.
        position_ids: [batch, tokens]; None = counted from 0.
        states: return the outputs of all blocks, [blocks, batch, tokens, hidden], not only those of the last.
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
        """Sequences [low, high) of the batch."""
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
    """Some blocks that were run with their graph kept: their input, and the outputs that have gradients."""

    blocks: int
    given: Tensor
    outputs: list[Tensor]
    values: Tensor | None
    """Values of the adapter in these blocks, as a leaf of the graph."""
    place: tuple[int, int]
    """Where these values begin and end among those of the whole adapter."""


class _SavedInputs:
    """Counts the bytes of tensors that autograd saves for a graph: each storage once, and no weights."""

    def __init__(self, weights: frozenset[int]) -> None:
        """Args: weights: addresses of storages that are in memory anyway."""
        self.nbytes = 0
        self._known = set(weights)

    def counted(self) -> AbstractContextManager[object]:
        """A context in which the graphs that are made count."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in self._known:
                self._known.add(memory.data_ptr())
                self.nbytes += memory.nbytes()
        return tensor.detach()  # a graph that held its own output would never be freed


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
        gradient: with respect to the output, of its shape; the pass then runs backward as well.
        adapter: of these blocks, at least.
        trains: compute the gradient with respect to the adapter's values, too.
        keeps: keep the graph for a later `begin_backward`; only without a gradient.

        Raises:
            UsageError: shapes do not fit each other or the model, or the blocks are not in this stage.
        """
        stage.check_full_sequences(
            inputs.hidden, inputs.start, inputs.stop, inputs.attention_mask, inputs.position_ids
        )
        self._stage = stage
        self._inputs = inputs
        self._position = inputs.start
        self._states: list[Tensor] = []
        self._pieces: list[_Piece] = []
        self._runs_backward = False
        self._has_graph = keeps or gradient is not None
        self._saved = _SavedInputs(stage.weights) if keeps else None
        self._adapter = None if adapter is None else adapter.within(inputs.start, inputs.stop)
        self.adapter_gradient: Tensor | None = None
        """Once nothing is left: with respect to the adapter's values in these blocks, if `trains`."""
        if trains and self._adapter is not None:
            self.adapter_gradient = torch.zeros_like(self._adapter.values, dtype=torch.float32)
        with self._mode():
            # A copy: what was made in inference mode may not be used where there are gradients.
            self._hidden = inputs.hidden.to(stage.device, stage.dtype).clone()
        self._gradients: list[Tensor] = []
        """With respect to the outputs that are returned, first to last."""
        self._back: Tensor | None = None
        if gradient is not None:
            self.begin_backward(gradient)

    def begin_backward(self, gradient: Tensor) -> None:
        """Let a pass that keeps its graph run backward as well; may be called once.

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
        self._runs_backward = True

    @property
    def kept_bytes(self) -> int:
        """Bytes that the graph keeps, besides the weights."""
        return 0 if self._saved is None else self._saved.nbytes

    def discard_graph(self) -> None:
        """Keep no graph, now and from now on; the pass is a forward pass only."""
        with self._mode():
            self._hidden = self._hidden.detach()
        self._pieces, self._states = [], [state.detach() for state in self._states]
        self._has_graph, self._saved = False, None

    @property
    def blocks_left(self) -> int:
        """Number of blocks that are still to be run forward."""
        return self._inputs.stop - self._position

    @property
    def left(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self.blocks_left or (self._runs_backward and self._pieces))

    def advance(self, blocks: int) -> int:
        """Run the next piece: up to `blocks` blocks forward, or the last piece that was kept backward.

        Returns: the number of blocks that were run.
        """
        with self._mode():
            if self.blocks_left:
                return self._forward(min(blocks, self.blocks_left))
            return self._backward(self._pieces.pop())

    def result(self) -> Tensor:
        """The output; or the gradient with respect to the input [batch, tokens, hidden]."""
        if self._runs_backward:
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
                self._hidden = self._stage.run_full_sequences(
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
        if self._inputs.states and not self._runs_backward:
            self._states += [output.detach() for output in outputs]
        self._position = high
        return blocks

    def _tuned(self, low: int, high: int) -> tuple[Tensors | None, Tensor | None, tuple[int, int]]:
        """The adapter in blocks [low, high): its tensors, its values if they are trained, and where these
        lie.
        """
        if self._adapter is None:
            return None, None, (0, 0)
        if self.adapter_gradient is None:
            return self._adapter.tensors, None, (0, 0)
        part = self._adapter.within(low, high)
        values = part.values.detach().requires_grad_()
        place = extent(self._adapter.slots, low, high)
        return Tensors.of(part.spec, part.slots, values), values, place

    def _cuts(self, low: int, high: int) -> Sequence[tuple[int, int]]:
        """Ranges of blocks to run at a time: one block each if the outputs of all are returned."""
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
        """The gradients of the last `count` outputs, and the rest."""
        at = len(self._gradients) - count
        return self._gradients[at:], self._gradients[:at]

    def _mode(self) -> AbstractContextManager[object]:
        if not self._has_graph:
            return torch.inference_mode()
        modes = ExitStack()
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        return modes
