"""transformers' assisted generation with a window that adapts: where it works, and what it learns.

Drafting, verification and sampling are transformers' own. Its candidate generator is wrapped by one that sets
the number of draft tokens before each step (0 = an ordinary step) and notes how many were accepted.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TextStreamer
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator, GenerationMixin
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from swarmkit.client.session.session import Session
from swarmkit.client.speculation.window import (
    DRAFTED,
    LONGEST_MATCH,
    MAX_DRAFT_TOKENS,
    Learned,
    Round,
    Windows,
)
from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import UsageError

Speculation = Literal["off", "auto", "prompt-lookup"]
SPECULATIONS = ("off", "auto", "prompt-lookup")

_MATCH_TOKENS = 3
"""The longest run of tokens that is looked up, unless the user gives another."""
_MATCHES = 64
"""Places that are compared to find how long a match is."""
_OWN_WAYS = ("prompt_lookup_num_tokens", "use_mtp", "assistant_early_exit")
"""What `generate()` takes besides a draft model to choose assisted generation."""
_POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[2:]
"""Names of the arguments of `generate()` after `inputs`."""


@dataclass(frozen=True)
class SpeculationCount:
    """How many tokens were drafted, and how many of them were accepted."""

    steps: int = 0
    """Steps with draft tokens."""
    drafted: int = 0
    accepted: int = 0

    def plus(self, drafted: int, accepted: int) -> SpeculationCount:
        return SpeculationCount(self.steps + 1, self.drafted + drafted, self.accepted + accepted)

    def since(self, earlier: SpeculationCount) -> SpeculationCount:
        """The difference from an earlier count."""
        return SpeculationCount(
            self.steps - earlier.steps, self.drafted - earlier.drafted, self.accepted - earlier.accepted
        )

    def __str__(self) -> str:
        return f"{self.accepted} of {self.drafted} draft tokens accepted"


# where it can be used


def named_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate()` after `inputs`, all by name."""
    return dict(zip(_POSITIONAL, args, strict=False)) | dict(kwargs)


def choose_way(
    wish: Speculation | None,
    usual: Speculation,
    options: dict[str, Any],
    configured: Callable[[str], Any],
    rows: int | None,
    is_stateful: bool = False,
) -> dict[str, Any]:
    """Options of `generate()` with which it drafts tokens as wished, as far as it can.

    Args:
        wish: for this call; None = the usual.
        options: of `generate()`, by name.
        configured: the value of an option wherever it is given, None if nowhere.
        rows: sequences; None = not given as token ids.

    Raises:
        UsageError: this call wishes for what is impossible.
    """
    if wish is not None and wish not in SPECULATIONS:
        raise UsageError(f"speculation={wish!r} is none of {', '.join(map(repr, SPECULATIONS))}")
    named = [name for name in _OWN_WAYS if configured(name)]
    if options.get("assistant_model") is not None:
        named.append("assistant_model")
    if named:
        if wish == "prompt-lookup" and named != ["prompt_lookup_num_tokens"]:
            raise UsageError(f"give either speculation='prompt-lookup' or {named[0]}, not both")
        return options
    chosen = wish or usual
    if chosen == "off":
        return options
    obstacle = why_not(options, configured, rows, is_stateful)
    if obstacle and wish == "prompt-lookup":
        raise UsageError(f"speculation='prompt-lookup' does not work with {obstacle}; leave one of them out")
    if chosen == "auto":
        obstacle = obstacle or why_not_the_same(options, configured)
    return options if obstacle else _with_lookup(options, configured)


def why_not(
    options: Mapping[str, Any], configured: Callable[[str], Any], rows: int | None, is_stateful: bool
) -> str | None:
    """What keeps transformers from assisted generation, in words; None = nothing."""
    if rows is None:
        return "inputs that are no token ids"
    if rows != 1:
        return f"a batch of {rows}"
    if is_stateful:
        return "a model whose blocks have a state that cannot be cut back"
    for name in ("num_beams", "num_return_sequences"):
        if (configured(name) or 1) > 1:
            return f"{name}={configured(name)}"
    if configured("use_cache") is False:
        return "use_cache=False"
    for name in ("past_key_values", "cache", "inputs_embeds", "custom_generate"):
        if options.get(name) is not None:
            return f"a given {name}"
    others = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "cache_implementation")
    return next((name for name in others if configured(name)), None)


def why_not_the_same(options: Mapping[str, Any], configured: Callable[[str], Any]) -> str | None:
    """What would let an answer differ from the one without speculation, though no worse; None = nothing.

    Sampled tokens are distributed alike, but a seed gives others. A processor may count its calls, a
    criterion is asked only after each step, and a streamer may expect tokens one by one.
    """
    if configured("do_sample"):
        return "sampling"
    for name in ("logits_processor", "prefix_allowed_tokens_fn", "negative_prompt_ids"):
        if options.get(name) is not None and (callable(options[name]) or len(options[name])):
            return name
    if any(not getattr(each, "takes_several", False) for each in options.get("stopping_criteria") or ()):
        return "stopping_criteria"
    for name in ("stop_strings", "watermarking_config", "output_attentions", "output_hidden_states"):
        if configured(name):
            return name
    if (configured("guidance_scale") or 1) != 1:
        return "guidance_scale"
    streamer = options.get("streamer")
    if streamer is None or isinstance(streamer, TextStreamer) or getattr(streamer, "takes_several", False):
        return None
    return "a streamer that may expect tokens one by one"


def _with_lookup(options: dict[str, Any], configured: Callable[[str], Any]) -> dict[str, Any]:
    wanted = {
        "prompt_lookup_num_tokens": MAX_DRAFT_TOKENS,
        "max_matching_ngram_size": configured("max_matching_ngram_size") or _MATCH_TOKENS,
    }
    config = options.get("generation_config")
    if config is None:
        return options | wanted
    config = copy.copy(config)
    for name, value in wanted.items():
        setattr(config, name, value)
    return options | {"generation_config": config}


# what is learned


class Speculator:
    """What one model's calls of `generate()` learned about speculation."""

    def __init__(self, clock: Callable[[], float] = SYSTEM_CLOCK.now) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lookup = Learned()
        self._drafts: weakref.WeakKeyDictionary[PreTrainedModel, Learned] = weakref.WeakKeyDictionary()
        self.count = SpeculationCount()

    def adapt(
        self, inner: CandidateGenerator, session: Session | None, max_length: int
    ) -> CandidateGenerator:
        """A generator that drafts as `inner` does, with a window that adapts to what pays.

        Args:
            session: of the call; None = not known.
            max_length: tokens of prompt and answer.
        """
        if type(inner) is PromptLookupCandidateGenerator:
            windows = Windows(self._next_lookup(), most=inner.num_output_tokens)
            return _Lookups(inner, windows, session, max_length, self._add, self._clock)
        if type(inner) is AssistedCandidateGenerator:
            named = inner.assistant_model.generation_config.num_assistant_tokens
            learned = self._next_draft(inner.assistant_model)
            windows = Windows(learned, most=named or MAX_DRAFT_TOKENS, drafting=True)
            return _Drafts(inner, windows, session, max_length, self._add, self._clock)
        return inner  # draft models with other tokens, and other methods, keep transformers' windows

    def _next_lookup(self) -> Learned:
        with self._lock:
            self._lookup = self._lookup.copy()
            return self._lookup

    def _next_draft(self, model: PreTrainedModel) -> Learned:
        with self._lock:
            known = self._drafts.get(model)
            self._drafts[model] = known.copy() if known else replace(self._lookup.copy(), drafting_s=None)
            return self._drafts[model]

    def _add(self, drafted: int, accepted: int) -> None:
        with self._lock:
            self.count = self.count.plus(drafted, accepted)


class _Adaptive(CandidateGenerator, ABC):  # type: ignore[misc]
    """What lookups and draft models share: each step is timed, and its outcome noted."""

    def __init__(
        self,
        inner: Any,
        windows: Windows,
        session: Session | None,
        max_length: int,
        on_drafted: Callable[[int, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._inner = inner
        self.windows = windows
        self._session = session
        self._max_length = max_length
        self._on_drafted = on_drafted
        self._clock = clock
        self._is_prompt = True
        self._length = 0
        """Tokens of the text before the step."""
        self._draft_tokens: list[int] = []
        """Those of the step."""
        self._drafting_s = 0.0
        self._began = 0.0

    def get_candidates(  # type: ignore[override]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text `[1, tokens]` and the draft tokens behind it; their scores `[1, drafted, vocabulary]`."""
        began = self._clock()
        self._length = input_ids.shape[1]
        found = self._find(input_ids)
        candidates, scores = found or (input_ids, None)
        self._draft_tokens = candidates[0, self._length :].tolist()
        self._began = self._clock()
        self._drafting_s = self._began - began if found else 0.0
        return candidates, scores

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Learn from a step after which the text is `input_ids`, `[1, tokens]`."""
        step_s = self._clock() - self._began
        self._inner.update_candidate_strategy(input_ids, scores, num_matches)
        new = input_ids[0, self._length :].tolist()
        step = self._session.chain.latest if self._session else None
        round_ = Round(
            tokens=step.tokens if step and self._is_prompt else len(self._draft_tokens) + 1,
            drafted=len(self._draft_tokens),
            gained=len(new),
            step_s=step_s,
            network_s=sum(hop.network_ms for hop in step.hops) / 1e3 if step else 0.0,
            drafting_s=self._drafting_s,
            is_prompt=self._is_prompt,
            is_disturbed=step.recovered if step else False,
        )
        self._learn(round_, new)
        if self._draft_tokens:
            self._on_drafted(len(self._draft_tokens), len(new) - 1)
        self._is_prompt = False

    def _room(self) -> int:
        """Draft tokens that the answer, and the session, have room for."""
        room = self._max_length - self._length - 1
        return min(room, self._session.max_length - self._length) if self._session else room

    @abstractmethod
    def _find(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What `get_candidates` returns; None = no draft tokens were looked for."""

    @abstractmethod
    def _learn(self, round_: Round, new: list[int]) -> None:
        """Learn from a step that brought the tokens `new`."""


class _Lookups(_Adaptive):
    """Draft tokens that are looked up in the text, of which only the first few may be used."""

    _found: tuple[int, ...] = ()
    _kind = 1

    def _find(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        self._found = ()
        if self._is_prompt or self._room() < 1 or not self.windows.may_look():
            return None
        # One is looked up in any case: whether it would have been right is seen for free.
        self._inner.num_output_tokens = max(1, min(self.windows.affordable(), self._room()))
        candidates, scores = self._inner.get_candidates(input_ids)
        self._found = tuple(candidates[0, self._length :].tolist())
        if not self._found:
            return input_ids, None
        self._kind = match_length(input_ids[0], self._found[0])
        window = self.windows.choose(self._kind, len(self._found))
        return candidates[:, : self._length + window], scores

    def _learn(self, round_: Round, new: list[int]) -> None:
        outcomes = [drafted == token for drafted, token in zip(self._found, new, strict=False)]
        self.windows.record(round_, self._kind, outcomes)


class _Drafts(_Adaptive):
    """Draft tokens of a smaller model."""

    _is_ahead = False
    """Whether the draft model's cache holds draft tokens."""

    def _find(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        window = self.windows.choose(DRAFTED, self._room())
        if self._is_prompt:
            window = min(max(window, 1), self._room())  # the draft model gets the prompt's inputs only now
        if window < 1:
            if self._is_ahead:  # what follows is not what it drafted
                self._inner._update_past_and_masks(input_ids.to(self._inner.assistant_model.device))
                self._is_ahead = False
            return None
        self._inner.num_assistant_tokens = window
        self._is_ahead = True
        found: tuple[torch.Tensor, torch.Tensor | None] = self._inner.get_candidates(input_ids)
        return found

    def _learn(self, round_: Round, new: list[int]) -> None:
        if round_.is_prompt:
            round_ = replace(
                round_, drafting_s=0.0
            )  # it read the prompt once, which is the price of a draft model
        outcomes = [drafted == token for drafted, token in zip(self._draft_tokens, new, strict=False)]
        self.windows.record(round_, DRAFTED, outcomes)


def match_length(text: torch.Tensor, token: int) -> int:
    """How many of the last tokens of `text`, `[tokens]` came before `token` at an earlier place, at most.

    From 1, which is what a lookup needs, to `LONGEST_MATCH`.
    """
    length = text.shape[0]
    places = (text[1:] == token).nonzero()[-_MATCHES:, 0].tolist()
    tail = text[-LONGEST_MATCH:].tolist()
    best = 1
    for place in places:  # of the token before it
        before = text[max(place - LONGEST_MATCH + 1, 0) : place + 1].tolist()
        same = 0
        while same < min(len(before), len(tail), length) and before[-1 - same] == tail[-1 - same]:
            same += 1
        best = max(best, same)
    return best
