"""A session goes on at another server with the keys and values of the one that leaves, without a replay.

The client does not see them: the old server brings them to the new one, at the client's word to both
(`handover_messages.py` has the picture). Whatever goes wrong, the session is replayed from its history, as if
this had not been tried. The outputs of the new server hang on what the old one brought, so that nobody is
blamed for them: see `Standing.keys_from`.
"""

from __future__ import annotations

import logging

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.routing.handover_choice import HandoverFacts, is_handover_quicker, patience_s
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.replica import StageReplica
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import PeerError, ProtocolError, RemoteError
from swarmkit.events import KeysHandedOver, Owner
from swarmkit.net.protocol.handover_messages import (
    HANDOVER,
    AwaitKeys,
    GetKeysTaken,
    HandedOver,
    HandOver,
    KeysAwaited,
    KeysTaken,
)

logger = logging.getLogger(__name__)

_FLOAT32_BYTES = 4


async def handed_over(
    swarm: SwarmClient,
    stage: StageReplica,
    hop: Hop,
    adapter: ClientAdapter | ServerAdapter | None,
    rows: int,
    tokens: int,
    max_length: int,
    owner: Owner,
) -> StageReplica | None:
    """Have a server that leaves bring what it holds of a session to another one, if that is worthwhile.

    Args:
        stage: the session's part on the server that leaves.
        hop: the same blocks at the other server.
        rows, tokens: that the session holds.

    Returns: the session's part on the other server, which holds all tokens; None if it is to be replayed.

    Raises:
        PeerError: no session can be opened at the other server.
    """
    facts = _facts(swarm, stage, hop, rows, tokens)
    if facts is None:
        return None
    new = StageReplica(swarm, hop, stage.history, adapter)
    await new.open(max_length)
    try:
        began = swarm.clock.now()
        nbytes = await _bring(swarm, stage, new, rows, tokens, patience_s(facts))
    except PeerError as error:
        new.drop()
        if isinstance(error, RemoteError) and error.code == "not_linked":
            swarm.routes.cannot_link(stage.hop.server, hop.server)
        logger.info("%s did not hand over to %s, which is sent all inputs: %s", stage.hop, hop, error)
        return None
    except BaseException:
        new.drop()
        raise
    new.held = tokens
    new.standing.own_from = tokens
    new.standing.keys_from = stage.standing.keys_from or stage.hop.server.service_id
    swarm.events.emit(
        KeysHandedOver(
            stage.hop.server.peer_id,
            stage.hop.server.label,
            hop.start,
            hop.stop,
            hop.server.peer_id,
            hop.server.label,
            tokens,
            nbytes,
            swarm.clock.now() - began,
            time=swarm.clock.time(),
            owner=owner,
        )
    )
    return new


def _facts(swarm: SwarmClient, stage: StageReplica, hop: Hop, rows: int, tokens: int) -> HandoverFacts | None:
    """What speaks for a handover; None if there is none, or if it would take longer than a replay."""
    old, new, wish = stage.hop.server, hop.server, swarm.settings.sessions.hand_over
    is_whole = tokens > 0 and stage.held == tokens == stage.history.tokens and stage.order is None
    is_same = (stage.hop.start, stage.hop.stop, old.dtype) == (hop.start, hop.stop, new.dtype)
    if wish == "never" or not (is_whole and is_same and stage.connection and old.kv_bytes and new.kv_bytes):
        return None
    if stage.standing.is_doubted or stage.predecessor is not None:
        return None  # what it holds is to be computed by another server, and compared
    if old.peer_id == new.peer_id or not swarm.routes.may_link(old, new):
        return None
    rates = swarm.rates
    facts = HandoverFacts(
        size=rows * tokens,
        kv_bytes=max(old.kv_bytes, new.kv_bytes) * (hop.stop - hop.start),
        hidden_bytes=swarm.model.hidden_size * _FLOAT32_BYTES,
        prompt_token_s=swarm.routes.prompt_token_s([hop]),
        old_way_s=swarm.routes.way_s(old.service_id),
        new_way_s=swarm.routes.way_s(new.service_id),
        to_new=rates.get(("", new.peer_id)),
        from_new=rates.get((new.peer_id, "")),
        from_old=rates.get((old.peer_id, "")),
        between=rates.get((old.peer_id, new.peer_id)),
    )
    must = wish == "always" or not swarm.settings.sessions.recovery
    return facts if must or is_handover_quicker(facts) else None


def _inlet_of(stage: StageReplica) -> str:
    opened = None if stage.connection is None else stage.connection.opened
    if opened is None or not opened.inlet:
        raise ProtocolError("the session has no name there", stage.hop.server.peer_id)
    return opened.inlet


async def _bring(
    swarm: SwarmClient, stage: StageReplica, new: StageReplica, rows: int, tokens: int, seconds: float
) -> int:
    """Ask both servers; returns how many bytes the old one says it brought.

    Raises:
        PeerError: one of them refuses, or fails, or they do not agree, or the time is over.
    """
    old_inlet, new_inlet = _inlet_of(stage), _inlet_of(new)
    old, server = stage.hop.server, new.hop.server
    there = await swarm.connect(server, HANDOVER)
    try:
        with there.within(swarm.connect_timeout):
            awaited = await there.ask(AwaitKeys(new_inlet, rows, tokens, old.peer_id), KeysAwaited)
        here = await swarm.connect(old, HANDOVER)
        try:
            ask = HandOver(old_inlet, rows, tokens, server.peer_id, server.service, awaited.ticket)
            with here.within(seconds):
                done = await here.ask(ask, HandedOver)
        finally:
            here.close()
        with there.within(swarm.connect_timeout):
            taken = await there.ask(GetKeysTaken(), KeysTaken)
    finally:
        there.close()
    if taken.tokens != tokens:
        raise ProtocolError(f"it holds {taken.tokens} of the {tokens} tokens", server.peer_id)
    return done.nbytes
