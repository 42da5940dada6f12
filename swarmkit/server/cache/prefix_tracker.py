"""The pages of one session, tracked to find pages that are kept, and to keep new ones.

::

    0 ──────── full pages: their names ──────── tokens
                                   │ tail: inputs and outputs since the last page but one

Only sessions of one row are tracked, without padding and with the usual positions: others begin alike too
rarely. A session that goes back behind its tail, to within a page, is tracked no further.

Used on the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swarmkit.models.kv.cache import PAGE_TOKENS, StageCache
from swarmkit.models.kv.pages import Name, names_of
from swarmkit.server.cache.prefix_cache import Page, PrefixCache

_TAIL_PAGES = 2


def tail_bytes(hidden_size: int, itemsize: int) -> int:
    """Return the bytes that a tracker holds at most between two steps."""
    return 2 * _TAIL_PAGES * PAGE_TOKENS * hidden_size * itemsize


class PrefixTracker:
    """Tracks one session's pages, whose names all begin with `root`."""

    def __init__(self, pages: PrefixCache, root: Name) -> None:
        self._pages = pages
        self.root = root
        self._names: list[Name] = []
        self._tail: list[tuple[Tensor, Tensor]] = []
        """Inputs and outputs of steps, `[tokens, hidden]`, from position `_tail_from` on."""
        self._tail_from = 0
        self._coming: tuple[Tensor, list[Name]] | None = None
        """Inputs of the step that runs, and the names of the pages that it fills."""
        self.tokens = 0
        self.lost = False

    def lose(self) -> None:
        """Track the session no further, until it begins anew."""
        self.lost = True
        self._names, self._tail, self._coming = [], [], None

    def cut(self, tokens: int) -> None:
        """Note that the session keeps its first `tokens` tokens."""
        if tokens == 0:
            self.lost = False
        if self.lost or tokens >= self.tokens:
            return
        self.tokens = tokens
        del self._names[tokens // PAGE_TOKENS :]
        if tokens >= self._tail_from:
            self._tail = _first(self._tail, tokens - self._tail_from)
        elif tokens % PAGE_TOKENS == 0:
            self._tail, self._tail_from = [], tokens
        else:
            self.lose()

    @torch.inference_mode()
    def find(self, inputs: Tensor, cache: StageCache) -> Tensor | None:
        """Put kept pages of a step's first tokens into the cache, before the step runs.

        Args:
            inputs: `[tokens, hidden]`, on the CPU, as the blocks are given them.
            cache: holds the tokens that were tracked.

        Returns: outputs `[tokens found, hidden]`; None if nothing was found.
        """
        self._coming = None
        if self.lost:
            return None
        # The page that the step begins in is named by all of its inputs.
        full = len(self._names) * PAGE_TOKENS
        begun = self.tokens - full
        if begun + len(inputs) < PAGE_TOKENS:
            self._coming = inputs, []
            return None
        whole = torch.cat([self._tail_inputs()[full - self._tail_from :], inputs]) if begun else inputs
        names = names_of(self._names[-1] if self._names else self.root, whole)
        self._coming = inputs, names
        found = self._pages.find(names)
        if not found:
            return None
        cache.append(_joined(found, begun))
        return torch.cat([page.output for page in found])[begun:]

    @torch.inference_mode()
    def recall(self, names: Sequence[Name], cache: StageCache) -> int:
        """Put the pages of these names, up to the first that is not kept, into a cleared cache.

        Returns: the number of tokens that it holds now.
        """
        cache.clear()
        self.cut(0)
        found = self._pages.find(names)
        if found:
            cache.append(_joined(found, 0))
            self._names = list(names[: len(found)])
        self.tokens = self._tail_from = len(found) * PAGE_TOKENS
        return self.tokens

    @torch.inference_mode()
    def follow(self, outputs: Tensor, cache: StageCache) -> None:
        """Keep the pages that a step has filled, unless they are kept already.

        Args: outputs: of all tokens of the step, also those found, `[tokens, hidden]`.
        """
        if self.lost or self._coming is None:
            return
        (inputs, names), self._coming = self._coming, None
        first = len(self._names)
        self.tokens += len(inputs)
        self._names += names
        if not names:
            # A view of an output that was computed with others would keep all of it.
            self._tail.append((inputs, outputs.clone()))
            return
        self._tail.append((inputs, outputs))
        new = [index for index, name in enumerate(names, start=first) if name not in self._pages]
        if new:
            known = torch.cat([out for _, out in self._tail])
            for index in new:
                begin = index * PAGE_TOKENS - self._tail_from
                page = Page(cache.page(index), known[begin : begin + PAGE_TOKENS].clone())
                self._pages.put(self._names[index], page)
        self._trim()

    def _trim(self) -> None:
        keep_from = max(0, len(self._names) - _TAIL_PAGES + 1) * PAGE_TOKENS
        if keep_from > self._tail_from:
            inputs = self._tail_inputs()[keep_from - self._tail_from :]
            outputs = torch.cat([out for _, out in self._tail])[keep_from - self._tail_from :]
            # Copies: a view would keep all of a long step's tensors.
            self._tail, self._tail_from = [(inputs.clone(), outputs.clone())], keep_from

    def _tail_inputs(self) -> Tensor:
        return torch.cat([given for given, _ in self._tail])


def _first(parts: list[tuple[Tensor, Tensor]], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first `tokens` tokens of some steps."""
    kept = []
    for given, out in parts:
        if tokens <= 0:
            break
        kept.append((given[:tokens], out[:tokens]))
        tokens -= len(given)
    return kept


def _joined(pages: list[Page], skip: int) -> list[tuple[Tensor, Tensor]]:
    """Join the keys and values of each block over all pages, without the first `skip` tokens."""
    blocks = range(len(pages[0].states))
    return [
        (
            torch.cat([page.states[block][0] for page in pages], dim=-2)[..., skip:, :],
            torch.cat([page.states[block][1] for page in pages], dim=-2)[..., skip:, :],
        )
        for block in blocks
    ]
