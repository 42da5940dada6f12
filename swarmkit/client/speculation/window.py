"""How many tokens to draft before each step: as many as pay, and never at more than a small price.

A step over 1 + w tokens gives one token for certain, and one more for each of its w draft tokens before the
first wrong one. If the k-th is right with probability a_k when those before it were, the step gives

    E(w) = 1 + a_1 + a_1·a_2 + … + a_1·…·a_w          (Leviathan et al., ICML 2023, eq. 1, for equal a_k)

tokens, and takes plain + w · slope + the time to draft. The window is the w with the most tokens per second.
Over long distances `plain` is mostly round trips, and slope next to nothing, so that wide windows pay even
where few draft tokens are right; between neighbours it is the other way round.

The bound on what speculation may cost does not rest on these estimates. A `Ledger` compares, as it goes, what
all steps took with what the same tokens would have taken one by one, and what the next draft token could lose
must be covered by what was won so far and by 3 % of the time that has passed. So generation takes at most
1.03 times what it takes without speculation, and the time by which one step exceeded its estimate.

No function here reads a clock: times are handed in, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MAX_DRAFT_TOKENS = 15
"""Unless the user gives another number: with one more token, servers still count a step as decoding."""

ALLOWANCE = 0.03
"""The share of the time without speculation that wrong draft tokens may take."""

DRAFTED = 0
"""The kind of a token from a draft model; a token from a lookup is of the kind of its match's length."""
LONGEST_MATCH = 4
"""Longer matches count as matches of so many tokens."""

_PRIORS = (0.6, 0.2, 0.5, 0.7, 0.8)
"""The probability that a draft token of each kind is right, before any was seen."""
_PRIOR_WEIGHT = 2.0
_MEMORY = 0.95
"""The weight of an observation when the next one of its kind comes."""

_GAIN = 0.125
_OUTLIER = 2.0
_SAFETY = 1.25
"""By how much draft tokens are assumed to exceed their usual time at most."""
_USUAL_SLOPE = 0.3
"""The time of a token beside another one, as a share of that of a token by itself, before any was seen."""
_WORTHWHILE = 1.02
"""How much faster decoding must be with draft tokens than without."""
_PROBE_SHARE = 0.01
"""The share of the time that may be spent to find out whether draft tokens would pay now."""
_REFRESH_AFTER = 32
"""Successive steps with draft tokens until a step without any measures the plain time again."""


class Acceptance:
    """How often draft tokens of each kind are right; the latest count most."""

    def __init__(self) -> None:
        self._right = [prior * _PRIOR_WEIGHT for prior in _PRIORS]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIORS)

    def copy(self) -> Acceptance:
        other = Acceptance()
        other._right, other._seen = list(self._right), list(self._seen)
        return other

    def observe(self, kind: int, right: bool) -> None:
        """Note a draft token whose predecessors in its step were right."""
        self._right[kind] = self._right[kind] * _MEMORY + right
        self._seen[kind] = self._seen[kind] * _MEMORY + 1

    def observe_run(self, kind: int, outcomes: Sequence[bool]) -> None:
        """Note the draft tokens of one step, up to the first wrong one."""
        for right in outcomes:
            self.observe(kind, right)
            if not right:
                return
            kind = after(kind)

    def probability(self, kind: int) -> float:
        return self._right[kind] / self._seen[kind]


def after(kind: int) -> int:
    """The kind of the token that follows a right one: a match is then one token longer."""
    return DRAFTED if kind == DRAFTED else min(kind + 1, LONGEST_MATCH)


@dataclass(frozen=True)
class Round:
    """One step and the draft tokens that went into it.

    Attributes:
        tokens: of the step; 1 + drafted, except for the prompt's.
        drafted: how many of them were draft tokens.
        gained: new tokens: the accepted draft tokens and one more.
        step_s: the time of the step.
        network_s: the part of `step_s` spent between machines, which hardly grows with tokens; 0 if unknown.
        drafting_s: the time to draft, also if no token was found; 0 if none was looked for.
        is_prompt: whether it was the first step, over the prompt.
        is_disturbed: whether a server was replaced, so that the time means nothing.
    """

    tokens: int
    drafted: int
    gained: int
    step_s: float
    network_s: float = 0.0
    drafting_s: float = 0.0
    is_prompt: bool = False
    is_disturbed: bool = False


@dataclass
class StepCost:
    """What steps take, by their number of tokens: plain_s + (tokens - 1) · slope_s.

    The slope is a weighted least-squares fit through the plain step. Before a step with draft tokens,
    a further token is assumed to cost no more than a token of the prompt did, or than a token by itself.
    """

    plain_s: float | None = None
    """The time of a step of one token; None = none seen."""
    plain_seen: int = 0
    growing_s: float = 0.0
    """The part of a plain step that may come once more with each token."""
    prompt_token_s: float | None = None
    _products: float = 0.0
    _squares: float = 0.0

    def observe(self, round_: Round) -> None:
        if round_.is_disturbed:
            return
        computing_s = max(round_.step_s - round_.network_s, 0.0)
        if round_.is_prompt:
            if round_.tokens > 1:
                self.prompt_token_s = computing_s / round_.tokens
        elif not round_.drafted:
            self._observe_plain(round_.step_s, computing_s)
        elif self.plain_s is not None:
            more = round_.tokens - 1
            # More computing is not cheaper; if it seems so, the plain step takes another time now.
            self._products = _MEMORY * self._products + more * max(round_.step_s - self.plain_s, 0.0)
            self._squares = _MEMORY * self._squares + more * more

    def _observe_plain(self, step_s: float, computing_s: float) -> None:
        self.plain_seen += 1
        gain = max(_GAIN, 1 / self.plain_seen)
        if self.plain_s is None:
            self.plain_s, self.growing_s = step_s, computing_s
            return
        seen_s = min(step_s, _OUTLIER * self.plain_s)  # a disturbance of the network is not the usual time
        self.plain_s += gain * (seen_s - self.plain_s)
        self.growing_s += gain * (min(computing_s, seen_s) - self.growing_s)

    @property
    def slope_s(self) -> float:
        """The likely time of each further token of a step."""
        if self._squares:
            return self._products / self._squares
        return min(_USUAL_SLOPE * self.growing_s, self._prior_s)

    @property
    def most_slope_s(self) -> float:
        """The time that it is assumed to take at most."""
        return _SAFETY * (self.slope_s if self._squares else self._prior_s)

    @property
    def _prior_s(self) -> float:
        return self.growing_s if self.prompt_token_s is None else min(self.growing_s, self.prompt_token_s)


class Ledger:
    """The seconds that speculation has won or lost so far, and so those that it may still lose."""

    def __init__(self, allowance: float = ALLOWANCE) -> None:
        self._allowance = allowance
        self.balance_s = 0.0

    def covers(self, loss_s: float, plain_s: float) -> bool:
        """Whether the next step may take `loss_s` longer than a plain one and give no more tokens."""
        return self.balance_s >= 0 and loss_s <= self.balance_s + self._allowance * plain_s

    def enter(self, round_: Round, plain_s: float | None) -> None:
        """Note a round; `plain_s` is the time of a step of one token now."""
        if round_.is_disturbed:
            return
        if round_.is_prompt or not round_.drafted or plain_s is None:
            self.balance_s += self._allowance * round_.step_s - round_.drafting_s
            return
        took_s = round_.step_s + round_.drafting_s
        # A plain step, taken now, would not have been longer than this one was.
        self.balance_s += (1 + self._allowance) * round_.gained * min(plain_s, round_.step_s) - took_s


@dataclass
class Learned:
    """What one call of `generate()` learned for the next one."""

    cost: StepCost = field(default_factory=StepCost)
    acceptance: Acceptance = field(default_factory=Acceptance)
    drafting_s: float | None = None
    """The time of one token of a draft model, or of the lookup for a step; None = not known."""

    def copy(self) -> Learned:
        """For a new call, whose route may be another: its own steps soon outweigh earlier ones."""
        cost = replace(self.cost, plain_seen=min(self.cost.plain_seen, 1), prompt_token_s=None)
        return Learned(cost, self.acceptance.copy(), self.drafting_s)


class Windows:
    """The choice of one call of `generate()`, step by step.

    Args:
        learned: of earlier calls; is updated with each step.
        most: draft tokens in a step, at most.
        drafting: whether a draft model makes the tokens, each of which takes time, or they are looked up.
    """

    def __init__(self, learned: Learned, *, most: int = MAX_DRAFT_TOKENS, drafting: bool = False) -> None:
        self.learned = learned
        self._most = most
        self._drafting = drafting
        self._ledger = Ledger()
        self._since_probe_s = 0.0
        self._in_a_row = 0

    @property
    def balance_s(self) -> float:
        """The seconds that may still be lost."""
        return self._ledger.balance_s

    def may_look(self) -> bool:
        """Whether there is time for a lookup; only then is it known how good its tokens are."""
        plain_s = self.learned.cost.plain_s
        return plain_s is not None and self._ledger.covers(self.learned.drafting_s or 0.0, plain_s)

    def affordable(self) -> int:
        """How many draft tokens may be wrong in the next step."""
        plain_s = self.learned.cost.plain_s
        if plain_s is None:
            return 0
        windows = range(1, self._most + 1)
        return sum(self._ledger.covers(self._loss_s(window), plain_s) for window in windows)

    def choose(self, kind: int, available: int) -> int:
        """How many tokens to draft in the next step.

        Args:
            kind: of the first draft token.
            available: how many there are, or there is room for.
        """
        plain_s = self.learned.cost.plain_s
        most = min(self.affordable(), available)
        if plain_s is None or most < 1 or self._in_a_row >= _REFRESH_AFTER:
            return 0
        best, best_rate = 0, _WORTHWHILE / plain_s
        expected, run, ahead = 1.0, 1.0, kind
        for window in range(1, most + 1):
            run *= self.learned.acceptance.probability(ahead)
            expected += run
            ahead = after(ahead)
            rate = expected / (plain_s + self._more_s(window))
            if rate > best_rate:
                best, best_rate = window, rate
        return best or self._probe()

    def record(self, round_: Round, kind: int = DRAFTED, outcomes: Sequence[bool] = ()) -> None:
        """Learn from a step.

        Args:
            kind: of its first draft token.
            outcomes: which draft tokens were right, including those that were found but not used.
        """
        learned = self.learned
        learned.acceptance.observe_run(kind, outcomes)
        learned.cost.observe(round_)
        self._ledger.enter(round_, learned.cost.plain_s)
        self._since_probe_s += round_.step_s
        if round_.drafted:
            self._in_a_row += 1
            if round_.gained * (learned.cost.plain_s or 0.0) <= round_.step_s + round_.drafting_s:
                self._since_probe_s = 0.0  # it won nothing
        else:
            self._in_a_row = 0
        if round_.drafting_s and not round_.is_prompt:
            each_s = round_.drafting_s / max(round_.drafted, 1) if self._drafting else round_.drafting_s
            known_s = learned.drafting_s
            learned.drafting_s = each_s if known_s is None else known_s + _GAIN * (each_s - known_s)

    @property
    def _draft_s(self) -> float:
        """The time of one draft token; tokens of a lookup are there already when windows are chosen."""
        return (self.learned.drafting_s or 0.0) if self._drafting else 0.0

    def _more_s(self, window: int) -> float:
        """The likely time of a step with so many draft tokens beyond that of a plain one."""
        return window * (self.learned.cost.slope_s + self._draft_s)

    def _loss_s(self, window: int) -> float:
        """The time that it may take at most."""
        return window * (self.learned.cost.most_slope_s + _SAFETY * self._draft_s)

    def _probe(self) -> int:
        """Whether to draft one token though it does not seem to pay: only that shows if it does now."""
        return int(self._loss_s(1) <= _PROBE_SHARE * self._since_probe_s)
