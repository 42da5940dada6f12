"""A request for training, between wire and device: checked, and cut into what the device does at a time.

A job keeps the device until it is done, so that other clients' next tokens would wait for all of it. So the
rows go through in groups, and each group through a few blocks at a time: as many as fit into a slice of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.execution.full_sequences import FullSequencePass, FullSequences
from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.gradient_messages import Backward, GradientRequest
from swarmkit.net.protocol.messages import HIDDEN_DTYPES
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.server.sessions.session import check_plain
from swarmkit.server.training.activation_cache import ActivationCache, PassKey

STATES_FACTOR = 4
"""All blocks' outputs together may be so many times as many tokens as one block's."""

_MAX_POSITION = 2**24

Kind = Literal["forward", "backward"]


def check_request(
    request: GradientRequest,
    stage: Stage,
    fingerprint: str,
    max_tokens: int,
    codecs: Collection[str] = (),
) -> None:
    """Everything that the header alone can tell.

    Args: codecs: what hidden states and gradients may come and go in, besides `none`.

    Raises:
        Refusal: with the fault's code, and what was expected.
    """
    if request.fingerprint != fingerprint:
        raise Refusal(
            "wrong_model",
            f"this server serves the model {fingerprint}, not {request.fingerprint}; "
            "load the same checkpoint, or ask servers of yours",
        )
    if not stage.start <= request.start < request.stop <= stage.stop:
        raise Refusal(
            "blocks_not_held",
            f"blocks {request.start}:{request.stop} are not inside the served {stage.start}:{stage.stop}",
        )
    hidden = request.hidden
    if len(hidden.shape) != 3 or hidden.shape[2] != stage.hidden_size or 0 in hidden.shape:
        raise Refusal(
            "bad_shape",
            f"hidden states must be [batch, tokens, {stage.hidden_size}], got {list(hidden.shape)}",
        )
    if hidden.dtype not in HIDDEN_DTYPES:
        raise Refusal("bad_dtype", f"hidden states must be one of {HIDDEN_DTYPES}, not {hidden.dtype}")
    gradient_codec = request.gradient.codec if isinstance(request, Backward) else "none"
    for name in (hidden.codec, request.answer, gradient_codec):
        if name != "none" and name not in codecs:
            known = ", ".join(["none", *codecs])
            raise Refusal("bad_dtype", f"hidden states and gradients travel as {known} here, not as {name}")
    rows, tokens, _ = hidden.shape
    blocks = request.stop - request.start
    if rows * tokens > max_tokens:
        raise Refusal(
            "too_large",
            f"{rows} x {tokens} tokens are more than the {max_tokens} of one request; "
            "send fewer rows at a time, or shorter ones",
        )
    if request.states and blocks > 1 and rows * tokens * blocks > STATES_FACTOR * max_tokens:
        raise Refusal(
            "too_large",
            f"the states of {rows} x {tokens} tokens in {blocks} blocks are more than "
            f"{STATES_FACTOR} x {max_tokens}; ask for fewer blocks at a time",
        )
    if isinstance(request, Backward):
        shape = (blocks, *hidden.shape) if request.states else hidden.shape
        if request.gradient.shape != shape:
            raise Refusal(
                "bad_shape", f"the gradient must be {list(shape)}, got {list(request.gradient.shape)}"
            )
        if request.gradient.dtype not in HIDDEN_DTYPES:
            raise Refusal(
                "bad_dtype", f"the gradient must be one of {HIDDEN_DTYPES}, not {request.gradient.dtype}"
            )
    check_plain(request.mask, "mask", "uint8", (rows, tokens))
    check_plain(request.positions, "positions", "int64", (rows, tokens))
    if request.trains and not request.adapter:
        raise Refusal("bad_value", "the gradient of an adapter was asked for, but no adapter is named")


def row_groups(rows: int, tokens: int, most_tokens: int) -> list[tuple[int, int]]:
    """Rows [low, high) that go through together: as equal as can be, with `most_tokens` at most.

    A row is never cut: a longer one goes by itself.
    """
    per_group = max(1, most_tokens // tokens)
    groups = -(-rows // per_group)
    cuts = [rows * group // groups for group in range(groups + 1)]
    return list(itertools.pairwise(cuts))


class SliceTimes:
    """How long a block takes for a token, forward and backward, learnt from the slices that have been."""

    _WEIGHT = 0.25  # of a new measurement

    def __init__(self, slice_s: float) -> None:
        """Args: slice_s: seconds for which the device may be kept."""
        self.slice_s = slice_s
        self._means: dict[Kind, float] = {}

    def learn(self, kind: Kind, units: int, seconds: float) -> None:
        """So many tokens x blocks took so long."""
        new, old = seconds / units, self._means.get(kind)
        # One that was held up by something else is not to be believed at once.
        self._means[kind] = new if old is None else old + self._WEIGHT * (min(new, 4 * old) - old)

    def blocks(self, tokens: int, goes_back: bool) -> int:
        """How many blocks fit into a slice for so many tokens; at least one, and one before it is known.

        The way back is gone in the pieces of the way there, and takes longer.
        """
        kinds: list[Kind] = ["forward", "backward"] if goes_back else ["forward"]
        if any(kind not in self._means for kind in kinds):
            return 1
        slowest = max(self._means[kind] for kind in kinds)
        return max(1, int(self.slice_s / max(slowest * tokens, 1e-9)))


@dataclass
class GradientWork:
    """One request, as the engine runs it: `advance` until nothing is left, each time as a job.

    What is wrong with it, and can be seen in its values only, is refused by the first of them.
    """

    stage: Stage
    request: GradientRequest
    incoming: IncomingMessage
    times: SliceTimes
    group_tokens: int
    """Rows x tokens that go through together."""
    adapter: Adapter | None = None
    peer_id: str = ""
    """The client."""
    kept: ActivationCache = field(default_factory=lambda: ActivationCache(0))
    """Passes until their way back."""
    now: Callable[[], float] = SYSTEM_CLOCK.now
    """Seconds on the engine's clock."""
    done: int = field(default=0, init=False)
    """Rows x blocks."""
    _keep_as: PassKey | None = field(default=None, init=False)
    """None: what goes through is not kept for a way back."""
    _to_keep: list[FullSequencePass] = field(default_factory=list, init=False)
    """Of the groups that have gone through."""
    _were_kept: list[FullSequencePass] = field(default_factory=list, init=False)
    """Of the groups that are still to go back."""
    _pass: FullSequencePass | None = field(default=None, init=False)
    _groups: list[tuple[int, int]] = field(default_factory=list, init=False)
    _results: list[Tensor] = field(default_factory=list, init=False)
    _inputs: FullSequences | None = field(default=None, init=False)
    _gradient: Tensor | None = field(default=None, init=False)
    _encoded: tuple[TensorSpec, memoryview] | None = field(default=None, init=False)
    _adapter_gradient: Tensor | None = field(default=None, init=False)
    _within: Adapter | None = field(default=None, init=False)
    """The adapter in the request's blocks."""

    @property
    def goes_back(self) -> bool:
        return isinstance(self.request, Backward)

    @property
    def total(self) -> int:
        """What `done` will be in the end."""
        request = self.request
        return request.hidden.shape[0] * (request.stop - request.start) * (2 if self.goes_back else 1)

    @property
    def left(self) -> bool:
        return self.done < self.total

    def _begin(self) -> FullSequences:
        """Decode and check values, before the device is touched.

        Raises:
            Refusal: a value is not allowed.
        """
        request, incoming = self.request, self.incoming
        hidden = incoming.tensor(request.hidden)
        if not codec.is_finite(hidden):
            raise Refusal("not_finite", "the hidden states contain NaN or infinity")
        mask = incoming.tensor(request.mask) if request.mask is not None else None
        if mask is not None and bool((mask > 1).any()):
            raise Refusal("bad_value", "a mask may contain 0 and 1 only")
        positions = incoming.tensor(request.positions) if request.positions is not None else None
        if positions is not None and bool(((positions < 0) | (positions >= _MAX_POSITION)).any()):
            raise Refusal("bad_value", f"position ids must be in 0..{_MAX_POSITION - 1}")
        if isinstance(request, Backward):
            self._gradient = incoming.tensor(request.gradient)
            if not codec.is_finite(self._gradient):
                raise Refusal("not_finite", "the gradient contains NaN or infinity")
        device = self.stage.device
        rows, tokens, _ = hidden.shape
        self._groups = row_groups(rows, tokens, self.group_tokens)
        if self.kept.capacity_bytes and (isinstance(request, Backward) or request.returns):
            key = PassKey.of(self.peer_id, request, incoming)
            if not self.goes_back:
                self._keep_as = key
            elif (passes := self.kept.take(key)) is not None:
                self._were_kept = list(passes)
                self.done = rows * (request.stop - request.start)
        return FullSequences(
            hidden,
            request.start,
            request.stop,
            None if mask is None else mask.to(device),
            None if positions is None else positions.to(device),
            request.states,
        )

    def advance(self) -> None:
        """Run the next slice, on the engine's thread.

        Raises:
            Refusal: a value is not allowed, or the result is not finite.
        """
        if self._inputs is None:
            self._inputs = self._begin()
        inputs = self._inputs
        low, high = self._groups[0]
        if self._pass is None:
            self._pass = self._begin_group(inputs, low, high)
        one, tokens = self._pass, (high - low) * inputs.hidden.shape[1]
        kind: Kind = "forward" if one.blocks_left else "backward"
        began = self.now()
        # What is kept goes back in the same pieces.
        blocks = one.advance(self.times.blocks(tokens, self.goes_back or self._keep_as is not None))
        if self.stage.device.type != "cpu":
            # Else slices would pile up at the device, and a step that comes now would wait for all of them.
            torch.accelerator.current_stream(self.stage.device).synchronize()
        self.times.learn(kind, blocks * tokens, self.now() - began)
        self.done += (high - low) * blocks
        new_bytes = sum(other.kept_bytes for other in (*self._to_keep, one))
        if self._keep_as is not None and new_bytes > self.kept.capacity_bytes:
            self._keep_as = None
            self._to_keep.clear()
            one.discard_graph()
        if not one.left:
            self._results.append(one.result())
            if self._keep_as is not None:
                self._to_keep.append(one)
            if self.goes_back and (more := one.adapter_gradient) is not None:
                self._add_adapter_gradient(more, range(low, high))
            self._pass = None
            self._groups.pop(0)
        if not self._groups:
            self._encoded = self._finish()
            if self._keep_as is not None:
                self.kept.keep(self._keep_as, self._to_keep)

    def _begin_group(self, inputs: FullSequences, low: int, high: int) -> FullSequencePass:
        """The pass of some rows; one that was kept, if there is."""
        gradient = self._gradient
        if gradient is not None:
            gradient = gradient[:, low:high] if inputs.states else gradient[low:high]
        if gradient is not None and self._were_kept:
            one = self._were_kept.pop(0)
            one.begin_backward(gradient)
            return one
        keeps = self._keep_as is not None
        trains = self.request.trains and (self.goes_back or keeps)
        adapter = None if self.adapter is None else self.adapter.of_rows(range(low, high))
        return FullSequencePass(self.stage, inputs.rows(low, high), gradient, adapter, trains, keeps)

    def _add_adapter_gradient(self, of_rows: Tensor, rows: Sequence[int]) -> None:
        """Add what some rows contribute to the gradient of the adapter's values in the request's blocks."""
        assert self.adapter is not None
        if self._within is None:
            self._within = self.adapter.within(self.request.start, self.request.stop)
        if self._adapter_gradient is None:
            self._adapter_gradient = torch.zeros_like(self._within.values, dtype=of_rows.dtype)
        self._within.add_of_rows(self._adapter_gradient, of_rows, rows)

    def result(self) -> tuple[TensorSpec, memoryview]:
        """When nothing is left: the output or gradient, as it goes over the wire."""
        assert self._encoded is not None
        return self._encoded

    def adapter_gradient(self) -> tuple[TensorSpec, memoryview] | None:
        """When nothing is left: with respect to the adapter's values [numel], if it was asked for."""
        return None if self._adapter_gradient is None else codec.encode(self._adapter_gradient)

    def _finish(self) -> tuple[TensorSpec, memoryview]:
        rows_at = 1 if self.request.states and not self.goes_back else 0
        result = self._results[0] if len(self._results) == 1 else torch.cat(self._results, dim=rows_at)
        of_adapter = self._adapter_gradient
        if not codec.is_finite(result) or (of_adapter is not None and not codec.is_finite(of_adapter)):
            what = "gradient" if self.goes_back else "output"
            dtype = str(self.stage.dtype).removeprefix("torch.")
            raise Refusal(
                "not_finite",
                f"the {what} of blocks {self.request.start}:{self.request.stop} became NaN or infinite in "
                f"{dtype}; scale the loss down, or use servers of a wider precision",
            )
        return codec.encode(result, self.request.answer)
