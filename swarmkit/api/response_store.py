"""Responses that the server remembers, so that a request can follow one of them by its id."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from swarmkit.api.refusals import ApiError


@dataclass(frozen=True)
class KeptResponse:
    """A response, and the conversation up to and with it.

    Attributes:
        owner: who may ask for it: the key with which it was made.
        messages: as chat templates have them.
        size: about how many bytes it takes.
    """

    owner: str
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int


class ResponseStore:
    """Keeps the last responses, in this process alone, in a bounded amount of memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()

    def keep(self, owner: str, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Remember a response; the oldest ones make room."""
        size = len(json.dumps([response, messages]))
        self._kept[response["id"]] = KeptResponse(owner, response, messages, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, owner: str, name: str, param: str | None = None) -> KeptResponse:
        """A response by its id.

        Raises:
            ApiError: it is another's, or not kept any more.
        """
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            raise ApiError(
                404,
                f"there is no response {name!r} here (any more); send the whole conversation as input",
                param=param,
                code="response_not_found",
            )
        return kept

    def forget(self, owner: str, name: str) -> None:
        """Forget a response.

        Raises:
            ApiError: it is another's, or not kept any more.
        """
        self._bytes -= self.get(owner, name).size
        del self._kept[name]
