"""How a model writes thoughts and calls of tools into its answers: the response template of its tokenizer.

transformers parses answers by such a template, piece by piece. Where a tokenizer has none, but its chat
template shows one of the usual formats, the template for that format is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_JSON_CALL = {"type": "function", "function": "{content}"}
_THOUGHTS = {"open": "<think>", "close": "</think>", "content": "text"}


@dataclass(frozen=True)
class ToolFormat:
    """The marks of one way to write a call of a tool.

    Attributes:
        mark: what a chat template contains that uses it.
        opening, closing: what stands before and behind the JSON of a call; empty where the call is not JSON
            with `name` and `arguments`, so that no grammar can force one.
        fields: of a response template.
    """

    mark: str
    opening: str
    closing: str
    fields: dict[str, Any]

    def template_for(self, chat_template: str) -> dict[str, Any]:
        """The template with which transformers parses answers."""
        fields = dict(self.fields)
        if "<think>" in chat_template:
            fields["reasoning_content"] = _THOUGHTS
        return {
            "defaults": {"role": "assistant"},
            "start_anchor_pattern": r"\A",  # what stands before the answer is cut off by the caller
            "fields": {**fields, "content": {"content": "text"}},
        }


_FORMATS = (
    ToolFormat(
        "<function=",
        "",
        "",
        {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
                },
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            }
        },
    ),
    ToolFormat(
        "<tool_call>",
        "<tool_call>\n",
        "\n</tool_call>",
        {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "content_args": {"allow_non_json": True},
                "transform": _JSON_CALL,
            }
        },
    ),
)
_THOUGHTS_ONLY = ToolFormat("<think>", "", "", {})


@dataclass(frozen=True)
class AnswerFormat:
    """What is known of a model's answers.

    Attributes:
        template: for transformers' parser; None = answers are text alone.
        is_own: whether the template came with the tokenizer, and so knows where in a prompt the answer
            begins.
        takes_tools: whether the chat template shows tools to the model.
        opening, closing: see `ToolFormat`.
    """

    template: dict[str, Any] | None
    is_own: bool
    takes_tools: bool
    opening: str = ""
    closing: str = ""


def answer_format(tokenizer: Any) -> AnswerFormat:
    """Find out how a model's answers are to be read."""
    chat_template = _template_text(tokenizer)
    takes_tools = "tools" in chat_template
    own = getattr(tokenizer, "response_template", None)
    marks = json.dumps(own) if own is not None else chat_template
    known = next((each for each in _FORMATS if each.mark in marks), None)
    opening, closing = (known.opening, known.closing) if known else ("", "")
    if own is not None:
        return AnswerFormat(own, True, takes_tools, opening, closing)
    if known is None and _THOUGHTS_ONLY.mark in chat_template:
        known = _THOUGHTS_ONLY
    if known is None:
        return AnswerFormat(None, False, False)
    takes_tools = takes_tools and known is not _THOUGHTS_ONLY
    return AnswerFormat(known.template_for(chat_template), False, takes_tools, opening, closing)


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return " ".join(template.values()) if isinstance(template, dict) else str(template)
