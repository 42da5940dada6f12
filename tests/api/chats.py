"""A model that knows tools: tiny-chat's weights with a chat template that shows tools in Hermes' form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import swarmkit.tinychat

TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|system|>Call tools as <tool_call>. Tools: ' + (tools | tojson) -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}{{- '<|user|><tool_response>' + message.content + '</tool_response>' -}}
{%- else -%}{{- '<|' + message.role + '|>' + (message.content or '') -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' -}}
{%- endfor -%}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
FORGETFUL = """\
{%- if tools -%}{#- it takes tools, as a template with <tool_call> does, and shows none -#}{%- endif -%}
{{- bos_token + '<|user|>' + messages[-1].content + '<|assistant|>' -}}
"""
"""Shows the last message and nothing else, so that tiny-chat answers it whatever came before."""
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"enum": ["Larkhill", "Oakford"]}, "celsius": {"type": "boolean"}},
        "required": ["town", "celsius"],
        "additionalProperties": False,
    },
}
ADD = {
    "name": "add",
    "description": "Adds two digits.",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "enum": [1, 2, 3]} for name in "ab"},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


def with_tools(folder: Path, template: str = TEMPLATE) -> Path:
    """Make the checkpoint in a folder."""
    own = Path(swarmkit.tinychat.__file__).parent / "checkpoint"
    made = folder / "tiny-tools"
    shutil.copytree(own, made)
    (made / "chat_template.jinja").write_text(template)
    return made


def openai_tool(function: dict[str, object]) -> dict[str, object]:
    """A tool as chat completions want it."""
    return {"type": "function", "function": function}


def is_weather(arguments: str) -> bool:
    """Whether the arguments of a call are what the tool asks for."""
    found = json.loads(arguments)
    return found["town"] in ("Larkhill", "Oakford") and isinstance(found["celsius"], bool)
