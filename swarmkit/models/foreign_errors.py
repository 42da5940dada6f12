"""What other libraries' errors mean for a user: their own words, without advice that is unsafe here."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How errors of safetensors, which is written in Rust, end that come from the operating system."""


def reason_of(error: BaseException) -> str:
    """Return in one line why something could not be loaded.

    transformers and torch advise to switch a protection off (`trust_remote_code`, `weights_only`), which
    swarmkit never does: the answer then says what the file asks for.
    """
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs program code from its repository, and swarmkit runs no code from repositories"
    if "weights_only" in text or "Weights only load failed" in text:
        return "it holds Python objects other than tensors"
    return text


def disk_trouble(error: BaseException) -> str | None:
    """Return what is wrong with this machine's disk, such as "No space left on device", if that is why an
    error was raised; else None.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if (found := _OS_ERROR.search(str(cause))) is not None:
            number = int(found[1])
        if number in _DISK_ERRORS:
            return os.strerror(number)
        if isinstance(cause, FileNotFoundError) and "No usable temporary directory" in str(cause):
            return "no folder for temporary files can be written to"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
