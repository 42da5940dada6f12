"""What several of OpenAI's formats share: fields of requests, messages, probabilities, usage, errors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarmkit.api.conversation import arguments_of
from swarmkit.api.engine import new_seed
from swarmkit.api.refusals import ApiError, invalid, text_only
from swarmkit.client.token_chances import TokenChance

Name = Annotated[str, Field(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
_MOST_STOPS = 16
_WORDS = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "file": "files",
    "input_file": "files",
    "document": "documents",
    "video_url": "video",
}


class Wire(BaseModel):
    """A part of a request. Fields that this server does not know are ignored."""

    model_config = ConfigDict(extra="ignore")


class SamplingFields(Wire):
    """How tokens are chosen; fields that are not given are as the model's own generation config says."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Seed | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling`, by name."""
        found = {name: getattr(self, name) for name in SamplingFields.model_fields}
        found["top_k"] = None if self.top_k is None else max(0, self.top_k)
        found["seed"] = new_seed() if self.seed is None else self.seed
        return found


class StreamOptions(Wire):
    """What a stream tells besides the answer."""

    include_usage: bool = False


def bias_of(bias: dict[str, float] | None, vocabulary: int) -> dict[int, float] | None:
    """OpenAI's `logit_bias`, by token id."""
    if bias is None:
        return None
    found: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isdecimal() or int(key) >= vocabulary:
            raise invalid("logit_bias", f"{key!r} is not one of the model's {vocabulary} token ids")
        if not -100 <= value <= 100:
            raise invalid("logit_bias", "a bias is between -100 and 100")
        found[int(key)] = value
    return found


def stops_of(stop: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The strings that end an answer."""
    given = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(given) > _MOST_STOPS or any(len(each) > 1024 for each in given):
        raise invalid(param, f"at most {_MOST_STOPS} strings of at most 1024 characters can end an answer")
    return tuple(each for each in given if each)


def new_id(kind: str) -> str:
    """A name for an answer, such as `chatcmpl-…`."""
    return f"{kind}{secrets.token_hex(12)}"


def content_text(content: Any, param: str) -> str:
    """The text of a message's content, which is a string or a list of parts.

    Raises:
        ApiError: a part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(param, "content is a string or a list of parts")
    return "".join(part_text(part, f"{param}[{place}]") for place, part in enumerate(content))


def part_text(part: Any, param: str) -> str:
    """The text of one part of a message's content.

    Raises:
        ApiError: it is no text.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid(param, "a part of content is an object with a type")
    kind = part.get("type")
    text = part.get("refusal") if kind == "refusal" else part.get("text")
    if kind in ("text", "input_text", "output_text", "refusal") and isinstance(text, str):
        return text
    raise text_only(param, _WORDS.get(str(kind), f"content of type {kind!r}"))


def tool_of(name: Any, description: Any, parameters: Any, param: str) -> dict[str, Any]:
    """A tool in the form of chat templates."""
    if not isinstance(name, str) or not name or len(name) > 256:
        raise invalid(param, "a function has a name of 1 to 256 characters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(param, "the parameters of a function are a JSON schema")
    function = {
        "name": name,
        "description": description if isinstance(description, str) else "",
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def call_of(call_id: Any, name: Any, arguments: Any, param: str) -> dict[str, Any]:
    """An earlier call of a tool in the form of chat templates."""
    if not isinstance(name, str) or not isinstance(arguments, str | dict):
        raise invalid(param, "a call of a function has a name and arguments")
    given = arguments_of(arguments, param) if isinstance(arguments, str) else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def chance(each: TokenChance) -> dict[str, Any]:
    """A token and its probability, as chat completions and responses tell it."""
    whole = "\N{REPLACEMENT CHARACTER}" not in each.text
    return {
        "token": each.text,
        "logprob": each.logprob,
        "bytes": list(each.text.encode()) if whole else None,
    }


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI words it."""
    kinds = {
        401: "authentication_error",
        404: "not_found_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def usage_of(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """Tokens of a request, as chat completions and completions tell them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Stop = str | list[str] | None


def sorted_rows(rows: Sequence[Any]) -> list[Any]:
    """Choices in the order of their numbers."""
    return sorted(rows, key=lambda row: row["index"])
