"""Names of pages, which are hashes of a stage's inputs up to the end of the page.

A page's name is a hash of the name before it and of the page's inputs, so that equal names mean equal inputs
from the very first token on. Client and server must hash the inputs in the same dtype, the stage's own.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import torch
from torch import Tensor

from swarmkit.models.kv.cache import PAGE_TOKENS

Name: TypeAlias = bytes
NAME_BYTES = 32


def names_of(before: Name, inputs: Tensor) -> list[Name]:
    """Name the full pages that inputs `[tokens, hidden]` make, behind the page (or root) `before`."""
    plain: Any = inputs.contiguous().view(torch.uint8).numpy()
    names = []
    for first in range(0, len(plain) - PAGE_TOKENS + 1, PAGE_TOKENS):
        digest = hashlib.sha256(before)
        digest.update(plain[first : first + PAGE_TOKENS])
        before = digest.digest()
        names.append(before)
    return names
