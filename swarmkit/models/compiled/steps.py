"""Compiled decode steps: on CPUs what CUDA graphs are on accelerators.

A block's decode step is a few dozen small operations, for which Python may take longer than the processor
does. So it is compiled once for each kind of block (`trace`), and a token passes through a stage as one call
for each block. Sessions are in static slots (`swarmkit/models/kv/static_slots.py`), because a program is
compiled for keys and values that lie in one way::

    rows      a, b, c in a program for four: the fourth writes to the spare slot, and its output is dropped
    block i   hidden = program(hidden, positions, seen, keys and values of the rows' slots, its weights)

There is a program for each of a few numbers of rows. Everything else runs as it does without: other steps,
more sessions than there are slots, sessions that are longer than a slot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.compiled.kinds import LEAST_SEEN, NotCompiledError, StageKinds, weights_of
from swarmkit.models.execution.packed import PackedView, StepPart
from swarmkit.models.execution.stage import Stage
from swarmkit.models.foreign_errors import reason_of
from swarmkit.models.kv.layout import KeysAndValues
from swarmkit.models.kv.static_slots import StaticSlots

logger = logging.getLogger(__name__)


class Program:
    """A compiled decode step of a kind of block, for so many rows."""

    def __init__(self, package: Path) -> None:
        """Load it, which runs what is in it: see `shelf` for where it may come from.

        Raises:
            NotCompiledError: it cannot be loaded.
        """
        try:
            # One thread at a time runs it: the engine's.
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, -1)
        except Exception as error:
            raise NotCompiledError(f"a compiled program cannot be loaded: {reason_of(error)}") from error

    def __call__(self, arguments: list[Tensor]) -> Tensor:
        """Run it; the arguments are in the order that `trace` says, one behind the other."""
        return self._loader.run(arguments)[0]


class BlockWeights:
    """The weights of a stage's blocks, as programs take them."""

    def __init__(self, stage: Stage, kinds: StageKinds) -> None:
        self.of_block = kinds.of_block
        self._weights = []
        for block, digest in enumerate(kinds.of_block, start=stage.start):
            found = weights_of(stage.view_of(block, block + 1).model)
            self._weights.append([found[name] for name, _, _ in kinds.kinds[digest].weights])

    def of(self, index: int) -> list[Tensor]:
        """Those of a block, by its index in the stage."""
        return self._weights[index]


class SlotRows:
    """What a step of some rows in static slots gives to each block's program."""

    def __init__(self, slots: StaticSlots) -> None:
        self._slots = slots
        self._seen = torch.zeros(slots.length, dtype=torch.bool)
        self._rooms: dict[int, list[KeysAndValues]] = {}

    def inputs(self, rows: Sequence[int], tokens: Sequence[int], size: int) -> list[Tensor]:
        """Positions, and how much each row sees.

        Args:
            rows: the slots of sessions.
            tokens: that each of them holds.
            size: rows of the program.
        """
        seen = [held + 1 for held in tokens] + [LEAST_SEEN] * (size - len(rows))
        return [torch.tensor([one - 1 for one in seen]), *(self._seen[:one] for one in seen)]

    def rooms(self, index: int, rows: Sequence[int], size: int) -> list[Tensor]:
        """Keys of the rows' slots in a block, and then their values."""
        found = self._rooms.get(index)
        if found is None:
            pools = self._slots.pool(index)
            found = self._rooms[index] = [
                tuple(pool[row : row + 1] for pool in pools)  # type: ignore[misc]
                for row in range(self._slots.rows + 1)
            ]
        chosen = [found[row] for row in rows] + [found[-1]] * (size - len(rows))
        return [keys for keys, _ in chosen] + [values for _, values in chosen]


class CompiledSteps:
    """The compiled decode steps of a stage; a `DecodePath`.

    Attributes:
        work: False once a program has failed; then there are none, and the slots are released.
    """

    def __init__(self, stage: Stage, kinds: StageKinds, sessions: int, tokens: int) -> None:
        """Args:
        sessions: how many at once may run so.
        tokens: how long they may be; the keys and values of `sessions + 1` of that length are held.
        """
        self.work = True
        self._start = stage.start
        self._weights = BlockWeights(stage, kinds)
        self._slots = StaticSlots(sessions, tokens, clears=False)
        self._slot_rows = SlotRows(self._slots)
        self._programs: dict[int, Mapping[str, Program]] = {}
        self._size_for: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of rows that there are programs for."""
        return tuple(sorted(self._programs))

    def put(self, size: int, programs: Mapping[str, Program]) -> None:
        """Have programs for so many rows, by the digest of each kind."""
        self._programs[size] = programs
        self._size_for = [
            min((one for one in self._programs if one >= rows), default=0)
            for rows in range(max(self._programs) + 1)
        ]

    def run(
        self, blocks: tuple[int, int], view: PackedView, parts: Sequence[StepPart]
    ) -> list[Tensor] | None:
        """See `DecodePath`."""
        return self.step(parts)

    def step(self, parts: Sequence[StepPart]) -> list[Tensor] | None:
        """See `DecodePath.run`; the blocks are those of the parts' caches."""
        size = self._size_for[len(parts)] if len(parts) < len(self._size_for) else 0
        if not size or not self.work:
            return None
        rows = []
        for part in parts:
            slot = part.cache.acquire_slot(self._slots)
            if slot is None or part.cache.tokens >= slot.length - 1:  # see `trace.export_step`
                return None
            rows.append(slot.row)
        try:
            out = self._pass(size, rows, parts)
        except Exception:
            logger.warning("a compiled step failed, and tokens run without compiled steps now", exc_info=True)
            self._give_up(parts)
            return None
        for part in parts:
            part.cache.before_step(1)
            part.cache.after_step(part.hidden, None)
        return [out[row][None, None] for row in range(len(parts))]

    def _pass(self, size: int, rows: Sequence[int], parts: Sequence[StepPart]) -> Tensor:
        first, last = parts[0].cache.start - self._start, parts[0].cache.stop - self._start
        hidden = torch.cat([part.hidden[0] for part in parts])
        if size > len(parts):
            hidden = torch.cat([hidden, hidden.new_zeros(size - len(parts), hidden.shape[1])])
        inputs = self._slot_rows.inputs(rows, [part.cache.tokens for part in parts], size)
        programs = self._programs[size]
        for index in range(first, last):
            program = programs[self._weights.of_block[index]]
            rooms = self._slot_rows.rooms(index, rows, size)
            hidden = program([hidden, *inputs, *rooms, *self._weights.of(index)])
        return hidden

    def _give_up(self, parts: Sequence[StepPart]) -> None:
        self.work = False
        self._programs, self._size_for = {}, []
        self._slots.release()
        self._slot_rows = SlotRows(self._slots)
        for part in parts:
            part.cache.leave_slot()


class StepComparison:
    """A compiled step beside the one that it is to replace: sessions of noise, and the stage's own weights.

    Each block is given what the block before it has put out, as it is without compiled steps; so a difference
    is that of one block.
    """

    def __init__(self, stage: Stage, kinds: StageKinds, size: int, length: int) -> None:
        """Args: size, length: of the programs."""
        self._stage = stage
        self._weights = BlockWeights(stage, kinds)
        self._size = size
        self._length = length
        generator = torch.Generator().manual_seed(size)
        self._prompts = [
            torch.randn(1, _tokens_of(stage, row), stage.hidden_size, generator=generator).to(stage.dtype)
            for row in range(size)
        ]
        self._tokens = torch.randn(size, stage.hidden_size, generator=generator).to(stage.dtype)

    @torch.inference_mode()
    def difference(self, index: int, program: Program) -> float:
        """Largest difference of a block's outputs, keys and values, in parts of the largest of each.

        The blocks are compared one after the other, by their index in the stage.
        """
        stage, block = self._stage, self._stage.start + index
        caches = [stage.new_cache(block, block + 1) for _ in range(self._size)]
        self._prompts = [
            stage.forward(prompt, cache) for prompt, cache in zip(self._prompts, caches, strict=True)
        ]
        slots = StaticSlots(self._size, self._length, clears=False)
        held = [slots.take(index, cache.blocks, cache.tokens) for cache in caches]  # which keeps them taken
        rows, tokens = list(range(self._size)), [cache.tokens for cache in caches]
        slot_rows = SlotRows(slots)
        inputs = slot_rows.inputs(rows, tokens, self._size)
        rooms = slot_rows.rooms(index, rows, self._size)
        found = program([self._tokens, *inputs, *rooms, *self._weights.of(index)])
        parts = [StepPart(self._tokens[row][None, None], cache) for row, cache in enumerate(caches)]
        expected: list[Any] = stage.forward_many(parts)
        for result in expected:
            if isinstance(result, Exception):
                raise result
        self._tokens = torch.cat([result[0] for result in expected])
        pairs = [(self._tokens, found)]
        for row, cache in enumerate(caches):
            layer = cache.blocks[0]
            for kept, number in ((layer.keys, row), (layer.values, self._size + row)):
                pairs.append((kept, rooms[number][:, :, : tokens[row] + 1]))
        del held
        return max(_difference(*pair) for pair in pairs)


def _tokens_of(stage: Stage, row: int) -> int:
    """How many tokens a session of noise holds: another number in each row, and none outside a window."""
    view, token = stage.view_of(stage.start, stage.stop), torch.empty(1, 1, stage.hidden_size)
    wanted = LEAST_SEEN + 5 * row + 4
    return next(tokens for tokens in range(wanted, 0, -1) if view.needs_no_mask(token, tokens))


def _difference(expected: Tensor, found: Tensor) -> float:
    if not bool(found.isfinite().all()):
        return float("inf")
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((expected - found).abs().max() / largest)


class Race:
    """The same steps of the whole stage, compiled and not, of sessions of noise."""

    def __init__(self, stage: Stage, kinds: StageKinds, size: int, length: int) -> None:
        """Args: size, length: of the programs."""
        self._stage = stage
        self._trial = CompiledSteps(stage, kinds, size, length)
        self._size = size
        self._eager = [stage.new_cache(stage.start, stage.stop) for _ in range(size)]
        self._compiled = [stage.new_cache(stage.start, stage.stop) for _ in range(size)]
        generator = torch.Generator().manual_seed(size)
        self._token = torch.randn(1, 1, stage.hidden_size, generator=generator).to(stage.dtype)

    def put(self, programs: Mapping[str, Program]) -> None:
        """Have the programs, and sessions that hold a few tokens."""
        self._trial.put(self._size, programs)
        for cache in (*self._eager, *self._compiled):
            self._stage.forward(self._token.expand(1, LEAST_SEEN, -1), cache)

    def step_eagerly(self) -> None:
        """One token of each session, without compiled programs."""
        self._stage.forward_many([StepPart(self._token, cache) for cache in self._eager])

    @torch.inference_mode()
    def step_compiled(self) -> None:
        """One token of each session, by the programs.

        Raises:
            NotCompiledError: they failed.
        """
        if self._trial.step([StepPart(self._token, cache) for cache in self._compiled]) is None:
            raise NotCompiledError("the compiled steps failed when they were tried")
