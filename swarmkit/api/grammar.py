"""Answers that keep to a grammar: JSON, a JSON schema, or a call of a tool, by llguidance.

Each token that may not come next gets no probability. llguidance computes which these are, in a fraction of a
millisecond for any schema.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from swarmkit.api.refusals import ApiError, invalid

_WORDS = 32
"""Tokens in one element of a mask."""
_makers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def json_grammar(schema: dict[str, Any] | None, param: str) -> str:
    """The grammar of a JSON schema; of any JSON object if there is none.

    Raises:
        ApiError: the schema is malformed, or uses what cannot be checked token by token.
    """
    guidance = _library(param)
    wanted = {"type": "object"} if schema is None else closed(schema)
    return _checked(guidance.LLMatcher.grammar_from_json_schema(wanted, overrides=_COMPACT), param)


def call_grammar(
    opening: str, closing: str, tools: Sequence[dict[str, Any]], tokenizer: Any, param: str
) -> str:
    """The grammar of one call of one of these tools, as the model writes it.

    Args:
        opening, closing: what stands before and behind the JSON of a call.
        tools: each has `name` and `parameters`, a JSON schema.
    """
    _library(param)
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": closed(tool.get("parameters") or {"type": "object"}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = json.dumps({"anyOf": calls, "x-guidance": _COMPACT})
    before, behind = _marks(opening, tokenizer), _marks(closing, tokenizer)
    lark = f"start: {before} call {behind}\ncall: %json {schema}"
    return _checked(lark, param)


_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LEFT_ALONE = {"allOf", "const", "enum", "default", "examples"}
"""Values that are no schemas, and parts that name some properties each and would exclude each other's."""
_OPENING = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"}


def closed(schema: Any) -> Any:
    """The schema with no properties but those that it names, unless it says that others are welcome.

    A schema that says nothing allows any others, and a model would have to find an end by itself.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            found[key] = {name: closed(each) for name, each in value.items()}
        else:
            found[key] = value if key in _LEFT_ALONE else closed(value)
    names = isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object"
    if names and not _OPENING & schema.keys():
        found["additionalProperties"] = False
    return found


_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _marks(text: str, tokenizer: Any) -> str:
    """A mark in Lark's notation: a single token by its number, anything else as text."""
    parts = []
    mark = text.strip("\n")
    whole = tokenizer.convert_tokens_to_ids(mark) if mark in tokenizer.get_added_vocab() else None
    before, after = text[: text.index(mark)], text[text.index(mark) + len(mark) :]
    for part in (before, mark, after):
        if part == mark and whole is not None:
            parts.append(f"<[{whole}]>")
        elif part:
            parts.append(json.dumps(part))
    return " ".join(parts)


def _library(param: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            501,
            "this server cannot keep answers to a grammar; its owner has to install llguidance, with "
            "`pip install 'swarmkit-llm[api]'`",
            param=param,
            code="not_installed",
        ) from None
    return llguidance


def _checked(grammar: str, param: str) -> str:
    wrong = _library(param).LLMatcher.validate_grammar(grammar)
    if wrong:
        raise invalid(param, f"the schema cannot be used: {wrong}")
    return grammar


class GrammarConstraint(LogitsProcessor):
    """Forbids tokens after which an answer could not become what a grammar wants."""

    def __init__(
        self, grammar: str, tokenizer: Any, vocabulary: int, ends: frozenset[int], prompt_tokens: int
    ) -> None:
        """Make one for the answers to a prompt.

        Args:
            vocabulary: tokens that the model's output layer knows.
            ends: tokens that end an answer.
            prompt_tokens: tokens before the answer.
        """
        import llguidance

        self._grammar = grammar
        self._maker = _maker(tokenizer, vocabulary, ends)
        self._ends = ends
        self._seen = prompt_tokens
        self._rows: list[Any] = []
        self._new = lambda: llguidance.LLMatcher(self._maker, grammar)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = input_ids.shape[0]
        if not self._rows:
            self._rows = [self._new() for _ in range(rows)]
        new = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        mask = torch.full((rows, -(-scores.shape[1] // _WORDS)), -1, dtype=torch.int32)
        for row, (matcher, tokens) in enumerate(zip(self._rows, new, strict=True)):
            if not matcher.is_stopped():
                matcher.consume_tokens(tokens)
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(mask[row].data_ptr(), mask.shape[1] * 4)
            elif self._ends:
                mask[row] = 0
                for end in self._ends:
                    mask[row, end // _WORDS] |= _bit(end % _WORDS)
        bits = torch.arange(_WORDS, dtype=torch.int32)
        allowed = ((mask[:, :, None] >> bits) & 1).bool().reshape(rows, -1)[:, : scores.shape[1]]
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def _bit(place: int) -> int:
    """One bit of a signed number of 32 bits."""
    return 1 << place if place < _WORDS - 1 else -(1 << place)


def _maker(tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> Any:
    """The tokenizer in llguidance's form, made once."""
    import llguidance.hf

    with _making:
        if tokenizer not in _makers:
            _makers[tokenizer] = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=sorted(ends) or None
            )
        return _makers[tokenizer]
