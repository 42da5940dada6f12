"""Errors of a request's handling, as its peer is told of them."""

from __future__ import annotations

import gc
import weakref

import pytest

from swarmkit.errors import PeerTimeoutError, PeerUnreachableError
from swarmkit.net.rpc.faults import refusal_of


class Held:
    """What a request's handling has in memory."""


@pytest.mark.parametrize("error", [PeerUnreachableError("gone"), PeerTimeoutError("silent"), TimeoutError()])
def test_an_error_that_is_raised_on_holds_nothing_of_the_handling(error: Exception) -> None:
    def handle(error: list[Exception], watched: list[weakref.ref[Held]]) -> None:
        held = Held()
        watched.append(weakref.ref(held))
        try:
            raise error.pop()
        except Exception as caught:  # noqa: BLE001 - as endpoints do
            refusal_of(caught)

    watched: list[weakref.ref[Held]] = []
    errors = [type(error)(*error.args)]
    gc.disable()
    try:
        with pytest.raises(type(error)):
            handle(errors, watched)
        assert watched[0]() is None
    finally:
        gc.enable()
