"""Regular expressions in the config of a LoRA adapter, which may come from a stranger.

PEFT's configs name layers by regular expressions, and some of these take Python's matcher longer than the age
of the universe. So the structure of an expression is looked at before it is matched.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from swarmkit.errors import AdapterError

MAX_PATTERN_LENGTH = 4096
MAX_PATTERNS = 4096
MAX_PATH_LENGTH = 128

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MOST_REPEATS = 8
_MOST_WAYS = 256
"""How many combinations of alternatives an expression may offer to the matcher."""
_MOST_STEPS = 2**22
"""Of the matcher, for one name of a layer and all expressions of a field: about a tenth of a second."""


def check_patterns(config: Mapping[str, Any]) -> None:
    """Check the expressions of a `LoraConfig` (as a dict) before PEFT matches names of layers with them.

    Raises:
        AdapterError: one is malformed, or could take too long to match.
    """
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        given = config.get(field)
        if isinstance(given, str):
            repeats, _ = _checked(given, field)
            if repeats > _MOST_REPEATS:
                raise _too_slow(given, field)
    for field in ("rank_pattern", "alpha_pattern"):
        values = config.get(field) or {}
        if not isinstance(values, Mapping) or len(values) > MAX_PATTERNS:
            raise AdapterError(f"{field} is not a table of at most {MAX_PATTERNS} names of layers")
        steps = 0
        for pattern in values:
            repeats, ways = _checked(pattern, field)
            # One more repetition, as any prefix may stand before what is matched. Plain names cost nothing.
            steps += ways * MAX_PATH_LENGTH ** (repeats + 1) if repeats or ways > 1 else 0
            if steps > _MOST_STEPS:
                raise _too_slow(pattern, field)


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """Return alpha of the linear layer at `path`, for a config that `check_patterns` has passed."""
    alpha = config.get("lora_alpha", 8)
    if len(path) > MAX_PATH_LENGTH:
        raise AdapterError(f"the name of a layer has {len(path)} characters; {MAX_PATH_LENGTH} are allowed")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # Most patterns are plain names; an expression is matched only where it could be more.
        if pattern == path or path.endswith(f".{pattern}"):
            return float(value)
        if not _PLAIN.fullmatch(pattern) and re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(alpha)


_PLAIN = re.compile(r"\w+")
"""What stands for itself; a name with dots could match other characters in their places."""


def _checked(pattern: Any, field: str) -> tuple[int, int]:
    """Count the repetitions of an expression, and the combinations of its alternatives.

    Raises:
        AdapterError: it is malformed, or its repetitions lie in each other.
    """
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_LENGTH:
        raise AdapterError(f"{field} has an entry that is no name of a layer of usual length")
    try:
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{field} has {pattern[:80]!r}, which is no regular expression: {error}") from None
    repeats, ways = _cost_of(parsed, pattern, field)
    if ways > _MOST_WAYS:
        raise _too_slow(pattern, field)
    return repeats, ways


def _cost_of(parsed: Any, pattern: str, field: str, inside: bool = False) -> tuple[int, int]:
    """Count the repetitions of an expression, and the combinations of its alternatives."""
    repeats, ways = 0, 1
    for kind, value in parsed:
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, highest, repeated = value
            # What is repeated at most once is no repetition, but two ways to go on.
            is_repeated = highest > 1
            if is_repeated and inside:
                raise _too_slow(pattern, field)
            found, inner = _cost_of(repeated, pattern, field, inside or is_repeated)
            if is_repeated and (inner > 1 or found):
                raise _too_slow(pattern, field)
            repeats, ways = repeats + found + is_repeated, ways * (inner if is_repeated else inner + 1)
        elif name == "BRANCH":
            counts = [_cost_of(one, pattern, field, inside) for one in value[1]]
            repeats += max(count for count, _ in counts)
            ways *= sum(way for _, way in counts)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            found, inner = _cost_of(value if name == "ATOMIC_GROUP" else value[-1], pattern, field, inside)
            repeats, ways = repeats + found, ways * inner
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            raise _too_slow(pattern, field)
    return repeats, ways


def _too_slow(pattern: str, field: str) -> AdapterError:
    return AdapterError(
        f"{field} has the regular expression {pattern[:80]!r}, which could take without end to match; name "
        "the layers plainly"
    )
