"""Which session `generate()` uses: the innermost one whose `with` block encloses the call."""

from __future__ import annotations

import threading
import warnings
import weakref
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

from swarmkit.client.swarm.connection import Connection

Entered: TypeAlias = Token[tuple[Any, ...]]

_active: ContextVar[tuple[Any, ...]] = ContextVar("swarmkit_sessions", default=())
_older: weakref.WeakKeyDictionary[Any, weakref.WeakSet[threading.Thread]] = weakref.WeakKeyDictionary()
"""Sessions whose `with` blocks are open, and threads that had begun before; until a later one is warned."""


def enter(session: Any) -> Entered:
    """Begin a session's `with` block in this thread."""
    _older[session] = weakref.WeakSet(threading.enumerate())
    return _active.set((*_active.get(), session))


def leave(session: Any, entered: Entered | None) -> None:
    """End it."""
    if entered is not None:
        _active.reset(entered)
    _older.pop(session, None)


def active_session(connection: Connection) -> Any | None:
    """The innermost session of this connection whose `with` block encloses the call.

    A thread does not see the `with` blocks of others. One that began inside such a block, as transformers'
    streamers have it, is warned once.
    """
    for session in reversed(_active.get()):
        if session.connection is connection and session.is_whole:
            return session
    for session, older in list(_older.items()):
        if session.connection is connection and session.is_whole and threading.current_thread() not in older:
            del _older[session]  # once is enough
            warnings.warn(
                "generate() does not use the session whose `with` block is open in another thread; give it "
                "as generate(…, session=session) if it is meant",
                stacklevel=3,
            )
    return None
