"""A peer's view of who belongs to its private swarm: its own certificate, and those that others show.

A chain is read and its signatures are checked once for each peer that shows it. What may change, its expiry
and what the owner took back, is looked at each time. That is once per stream, once per request to the table
and once per record, and never for a step.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection

from swarmkit.clock import system_date
from swarmkit.errors import NotAdmittedError, ProtocolError, UsageError
from swarmkit.net.transport.certificates import (
    MAX_CHAIN_BYTES,
    Chain,
    Revocations,
    Role,
    fault_in_chain,
    fault_now,
    lacks,
    read_chain,
    read_revocations,
    roles_in,
    write_chain,
)
from swarmkit.net.transport.identity import VerifiedSignatures

logger = logging.getLogger(__name__)

_MOST_REMEMBERED = 4096

_ANY: frozenset[Role] = frozenset()
_OPENERS: dict[str, frozenset[Role]] = {
    "push": frozenset({"serve"}),
    "weights": frozenset({"serve", "use"}),
    "reach": _ANY,
}
_SERVERS: frozenset[Role] = frozenset({"serve"})
_USERS: frozenset[Role] = frozenset({"use"})


def roles_of_opener(stream: str) -> frozenset[Role]:
    """Of which roles the opener of a stream of a name needs one; none = any certificate will do.

    Servers push to servers, and each peer may ask whether it can be reached; the rest is use.
    """
    parts = stream.split("/")
    return _OPENERS.get(parts[1], _USERS) if len(parts) > 1 else _USERS


def roles_of_server(stream: str) -> frozenset[Role]:
    """Of which roles the peer that serves a stream needs one; none = any certificate will do."""
    return _ANY if stream.split("/")[1:2] == ["reach"] else _SERVERS


def roles_of_request(name: str) -> frozenset[Role]:
    """Of which roles a peer needs one for a request to the shared table; empty = any certificate will do."""
    return _SERVERS if name == "rpc_store" else _ANY


class Members:
    """Judges peers by the certificates that they show.

    Attributes:
        swarm: the id of the swarm.
        owner: the peer id whose signature certificates begin with.
        chain: this peer's own; empty for the owner, and for a peer that has none.
    """

    def __init__(
        self,
        swarm: bytes,
        owner: str,
        chain: Chain = (),
        clock: Callable[[], float] = system_date,
        most_remembered: int = _MOST_REMEMBERED,
    ) -> None:
        """Args:
        clock: Unix time, seconds.
        most_remembered: chains that were judged once and are not judged again.
        """
        self.swarm = swarm
        self.owner = owner
        self.chain = chain
        self.shown = write_chain(chain)
        """This peer's chain, as it shows it to others."""
        self.on_news: Callable[[bytes], None] = lambda _: None
        """Called with a signed list of revocations that is newer than the one before."""
        self._clock = clock
        self._most_remembered = most_remembered
        self._verify = VerifiedSignatures().verify
        self._known: OrderedDict[tuple[str, bytes], Chain | str] = OrderedDict()
        """Chains that peers have shown, or what is wrong with them for ever."""
        self._shown_last: OrderedDict[str, bytes] = OrderedDict()
        self._revocations: Revocations | None = None
        self._signed_revocations = b""

    @property
    def remembered(self) -> int:
        """How many chains are remembered, which need not be judged again."""
        return len(self._known)

    @property
    def revocations(self) -> Revocations | None:
        """The newest list of the owner's that is known."""
        return self._revocations

    @property
    def signed_revocations(self) -> bytes:
        """The same as it was signed, to be handed on; empty if there is none."""
        return self._signed_revocations

    def check_own(self, peer_id: str) -> None:
        """Refuse to begin as a peer that others would refuse.

        Raises:
            UsageError: the certificate is another peer's, has expired, or is none.
        """
        fault = self.fault_of(peer_id, self.shown)
        if fault:
            raise UsageError(
                f"the swarm key does not admit this peer, {peer_id}: {fault}. Give the identity that it was "
                "made for, with --identity FILE, or ask for another one"
            )

    def fault_of(self, peer_id: str, shown: bytes, needed: Collection[Role] = ()) -> str:
        """Why a peer that shows a chain may not do what needs one of some roles; empty if it may.

        Args:
            peer_id: authenticated by the transport, or by the signature of a record.
            needed: roles of which one is enough; none = any certificate.
        """
        chain = self._read(peer_id, shown)
        if isinstance(chain, str):
            return chain
        return fault_now(chain, self._clock(), self._revocations, peer_id) or lacks(roles_in(chain), needed)

    def admit(self, peer_id: str, shown: bytes, needed: Collection[Role] = ()) -> None:
        """Let a peer go on only if it may; see `fault_of`.

        Raises:
            NotAdmittedError: it may not; says why, as the peer itself is told.
        """
        fault = self.fault_of(peer_id, shown, needed)
        if fault:
            raise NotAdmittedError(fault, peer_id)
        self._shown_last[peer_id] = shown
        self._shown_last.move_to_end(peer_id)
        while len(self._shown_last) > self._most_remembered:
            self._shown_last.popitem(last=False)

    def is_member(self, peer_id: str) -> bool:
        """Whether a peer that was admitted before would still be, by the chain that it showed last."""
        shown = self._shown_last.get(peer_id)
        return shown is not None and not self.fault_of(peer_id, shown)

    def learn(self, signed: bytes) -> bool:
        """Take up a list of revocations. Returns whether it is newer than the one that is known.

        Raises:
            ProtocolError: it is malformed, or not signed by the owner of this swarm.
        """
        if signed and signed == self._signed_revocations:
            return False
        found = read_revocations(signed, self._verify)
        if found.owner != self.owner or found.swarm != self.swarm:
            raise ProtocolError("the list of revocations is of another swarm", found.owner)
        if self._revocations is not None and found.number <= self._revocations.number:
            return False
        self._revocations, self._signed_revocations = found, signed
        logger.info("the owner of the swarm has taken back certificates (list %d)", found.number)
        self.on_news(signed)
        return True

    def _read(self, peer_id: str, shown: bytes) -> Chain | str:
        if len(shown) > MAX_CHAIN_BYTES:
            return "it shows no certificate of this swarm"
        name = (peer_id, shown)
        found = self._known.get(name)
        if found is None:
            try:
                chain = read_chain(shown) if shown else ()
                found = fault_in_chain(chain, self.swarm, self.owner, peer_id, self._verify) or chain
            except ProtocolError:
                found = "it shows no certificate of this swarm"
            self._known[name] = found
            if len(self._known) > self._most_remembered:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(name)
        return found
