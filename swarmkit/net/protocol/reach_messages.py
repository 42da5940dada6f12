"""How a peer learns whether others can reach it: it asks one to dial it back.

=============  =======================  ===========================================
state          the asking peer sends    the other one answers with
=============  =======================  ===========================================
`idle`         `DialBack` -> `idle`     `DialedBack`, or `Fault`
any            (end of stream)          nothing is dialled any more
=============  =======================  ===========================================

Only the host that the asking peer comes from is dialled, so that nobody has others dialled.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarmkit.net.protocol.messages import Fault, ShortText, _Message
from swarmkit.net.protocol.protocol import Protocol


class DialBack(_Message, frozen=True):
    """Connect by TCP to this port of the host that I come from."""

    port: Annotated[int, msgspec.Meta(ge=1024, le=65535)]


class DialedBack(_Message, frozen=True):
    """Whether somebody answered there.

    Attributes:
        host: the one that was dialled, where the asking peer is seen to come from; empty if none was.
    """

    reached: bool
    host: ShortText = ""


REACH = Protocol("reach", DialBack | DialedBack | Fault, legal={"idle": {DialBack: "idle"}}, first="idle")
