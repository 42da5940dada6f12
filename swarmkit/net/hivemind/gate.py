"""What lets only peers with the swarm's key use the shared table, and only those that the lists admit.

hivemind's requests and answers have room for a nonce and a signature, which hivemind leaves empty unless it
is given an authorizer. A peer with a key puts a proof there, with every request and with every answer, and
its certificates where the swarm has an owner.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from swarmkit.errors import NotAdmittedError
from swarmkit.net.transport.members import roles_of_request
from swarmkit.net.transport.peer_lists import TableLists
from swarmkit.net.transport.swarm_key import PRIVATE, SwarmKey

_NONCE_BYTES = 16
_LISTED = "it does not admit this peer, by the lists of its owner; ask the owner, or join another peer"
_NO_MEMBER = "not admitted to the table of this private swarm: "

Call = Callable[..., Awaitable[Any]]
"""A remote procedure: `call(request, ...)` at the asking end, `call(request, context)` at the other one."""


class TableGate:
    """Proves to other peers, in their requests and answers, that this one has the key, and wants proof."""

    def __init__(self, key: SwarmKey | None, lists: TableLists | None = None) -> None:
        """Args: lists: of the peers that are dealt with; all of them if not given."""
        self._key = key
        self._lists = lists or TableLists("")
        self.refusal = ""
        """Why a peer refused this one, or was refused by it, last; empty = that did not happen."""

    def answering(self, name: str, answer: Call) -> Call:
        """Answer requests only of peers that have the key, and that the lists admit."""
        key, lists = self._key, self._lists

        async def gated(request: Any, context: Any) -> Any:
            ends = str(context.remote_id), str(context.local_id)
            if not lists.admit(ends[0]):
                raise NotAdmittedError(_LISTED, ends[0])
            if key is None:
                return await answer(request, context)
            auth = request.auth
            if not key.proves(auth.signature, "opener", name, *ends, auth.nonce):
                raise NotAdmittedError(PRIVATE, ends[0])
            shown = auth.client_access_token.signature
            if fault := key.fault_of(ends[0], shown, roles_of_request(name)):
                raise NotAdmittedError(f"{_NO_MEMBER}{fault}", ends[0])
            response = await answer(request, context)
            response.auth.nonce = auth.nonce
            response.auth.signature = key.proof("server", name, *ends, auth.nonce)
            response.auth.service_access_token.signature = key.credentials
            return response

        return gated

    def asking(self, name: str, ask: Call, own_id: str, peer_id: str) -> Call:
        """Ask a peer that is not blocked, and take its answer only if it has the key as well."""
        key, lists = self._key, self._lists

        async def gated(request: Any, *args: Any, **kwargs: Any) -> Any:
            if lists.block(peer_id):
                self.refusal = f"the user's lists exclude peer {peer_id}"
                raise NotAdmittedError(self.refusal, peer_id)
            if key is not None:
                request.auth.nonce = secrets.token_bytes(_NONCE_BYTES)
                request.auth.signature = key.proof("opener", name, own_id, peer_id, request.auth.nonce)
                request.auth.client_access_token.signature = key.credentials
            try:
                response = await ask(request, *args, **kwargs)
            except Exception as error:
                if why := self._why(str(error)):
                    self.refusal = f"peer {peer_id} admits no request of this peer: {why}"
                elif _NO_MEMBER in str(error):
                    said = str(error).partition(_NO_MEMBER)[2][:200]
                    self.refusal = f"peer {peer_id} admits no request of this peer, and says: {said}"
                raise
            if key is not None and not key.proves(
                response.auth.signature, "server", name, own_id, peer_id, request.auth.nonce
            ):
                self.refusal = f"peer {peer_id} does not have the key of this swarm"
                raise NotAdmittedError(self.refusal, peer_id)
            if key is not None:
                shown = response.auth.service_access_token.signature
                if fault := key.fault_of(peer_id, shown):
                    self.refusal = f"peer {peer_id} is no member of this swarm: {fault}"
                    raise NotAdmittedError(self.refusal, peer_id)
            return response

        return gated

    def _why(self, error: str) -> str:
        """Why a peer has refused a request, in words of this one; empty if it has failed otherwise."""
        if PRIVATE in error:
            return PRIVATE if self._key is None else "the key of its swarm is another one"
        return _LISTED if _LISTED in error else ""
