"""Files that hold a secret: readable by their owner alone, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from swarmkit.errors import UsageError

logger = logging.getLogger(__name__)

_OWNER_ONLY = 0o600


def read_secret(path: Path, what: str) -> bytes | None:
    """Read a file that holds a secret; None if there is none yet, or an empty one.

    Where other users of the machine may read it, this is told and taken from them.

    Args: what: what it is called in messages, such as "identity file".

    Raises:
        UsageError: it cannot be read.
    """
    with _explained(path, what, "read"):
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read()
        except FileNotFoundError:
            return None
    if not content:
        logger.warning("the %s %s is empty, as writing it was interrupted; a new one is made", what, path)
        return None
    if os.name == "posix" and mode & 0o077:
        logger.warning(
            "the %s %s could be read by other users of this machine (mode %o); its mode is %o from now on. "
            "If others may have read it, delete it, so that a new one is made",
            what,
            path,
            mode,
            _OWNER_ONLY,
        )
        with contextlib.suppress(OSError):
            path.chmod(_OWNER_ONLY)
    return content


def write_secret(path: Path, content: bytes, what: str) -> None:
    """Write a secret to a file that only its owner may read, and that holds all of it or is not there.

    A file that is there already is replaced.

    Raises:
        UsageError: it cannot be written.
    """
    with _explained(path, what, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _explained(path: Path, what: str, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the {what} {path} cannot be {done}: {error.strerror}. Name a file in a folder of yours"
        ) from error
