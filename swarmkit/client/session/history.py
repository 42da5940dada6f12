"""What the client sent to a stage: all that is needed to rebuild a lost server's cache elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarmkit.errors import SessionError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import CodecName, TensorSpec


class History:
    """The inputs `[batch, tokens, hidden]` of one stage of a session, on the CPU, in the order of positions.

    Kept in one buffer that grows by doubling, because it is cropped and reordered as the session is.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self.tokens = 0
        self.edits = 0
        """Grows whenever what was kept may be changed, by a crop or a reordering."""
        self.codec: CodecName = "none"
        """The codec in which these inputs are sent now; see `codecs.py`."""

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def write(self, position: int, hidden: torch.Tensor) -> None:
        """Forget everything from `position` on, then append `hidden`, `[batch, tokens, hidden]`."""
        if position > self.tokens:
            raise ValueError(f"position {position} is beyond the {self.tokens} tokens of this history")
        rows, tokens, width = hidden.shape
        if position < self.tokens:
            self.edits += 1
        if self._buffer is None or (position == 0 and rows != self._buffer.shape[0]):
            self._buffer = hidden.new_empty(rows, _room_for(tokens), width)
        elif position + tokens > self._buffer.shape[1]:
            grown = hidden.new_empty(rows, _room_for(position + tokens), width)
            grown[:, :position] = self._buffer[:, :position]
            self._buffer = grown
        self._buffer[:, position : position + tokens] = hidden
        self.tokens = position + tokens

    def encode(self, start: int, stop: int, new_from: int, name: CodecName) -> tuple[TensorSpec, memoryview]:
        """Positions [start, stop) for the wire, in a codec; they hold afterwards what the receiver decodes.

        Those before `new_from` were sent before and stay what they are: where the codec would change them,
        all of them are encoded as `none`.
        """
        if name == "none":
            return codec.encode(self.read(start, stop))
        assert self._buffer is not None
        first = max(start, new_from)
        if first < stop:
            self._buffer[:, first:stop] = codec.passed(self.read(first, stop), name)
        values = self.read(start, stop)
        spec, data = codec.encode(values, name)
        if first > start and not torch.equal(codec.decode(spec, data), values):
            return codec.encode(values)
        return spec, data

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions."""
        if tokens < self.tokens:
            self.edits += 1
            self.tokens = tokens

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; `order` may repeat rows or leave some out."""
        self.edits += 1
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(0, torch.tensor(order, dtype=torch.int64))

    def row(self, tokens: int) -> torch.Tensor | None:
        """A view of the only row, `[tokens, hidden]`; None if there are more rows, or fewer tokens."""
        if self._buffer is None or self._buffer.shape[0] != 1 or self.tokens < tokens:
            return None
        return self._buffer[0, :tokens]

    def view(self, start: int, stop: int) -> torch.Tensor:
        """Positions [start, stop) as `[batch, stop - start, hidden]`, where they are kept: see `edits`."""
        if self._buffer is None or stop > self.tokens:
            raise ValueError(f"positions {start}:{stop} are not in a history of {self.tokens} tokens")
        return self._buffer[:, start:stop]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Positions [start, stop) as `[batch, stop - start, hidden]`, contiguous."""
        return self.view(start, stop).contiguous()


class NoHistory(History):
    """The inputs of the present step only: a session with this history does not survive a lost server."""

    def __init__(self) -> None:
        super().__init__()
        self._from = 0
        """The position of the first token that is kept."""

    def write(self, position: int, hidden: torch.Tensor) -> None:
        self._buffer, self._from, self.tokens = hidden, position, position + hidden.shape[1]

    def skip_to(self, tokens: int) -> None:
        """The server got its inputs up to `tokens` from another server."""
        self._buffer, self._from, self.tokens = None, tokens, tokens

    def encode(self, start: int, stop: int, new_from: int, name: CodecName) -> tuple[TensorSpec, memoryview]:
        return codec.encode(self.read(start, stop), name)

    def reorder(self, order: Sequence[int]) -> None:
        self._buffer = None

    def row(self, tokens: int) -> torch.Tensor | None:
        return None

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self._buffer is None or start < self._from or stop > self.tokens:
            raise SessionError(
                "this session keeps nothing to survive a lost server with (ClientSessionSettings.recovery); "
                "open a new one"
            )
        return self._buffer[:, start - self._from : stop - self._from].contiguous()


def _room_for(tokens: int) -> int:
    return max(64, 1 << (tokens - 1).bit_length())
