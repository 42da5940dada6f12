"""What commands do around their imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from swarmkit.cli import console


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Let other tests have garbage of this time collected."""
    yield
    gc.unfreeze()


def test_no_garbage_is_looked_for_while_much_is_imported() -> None:
    with console.importing():
        assert not gc.isenabled()


def test_garbage_is_looked_for_again_after_imports_that_failed() -> None:
    with pytest.raises(ImportError), console.importing():
        raise ImportError
    assert gc.isenabled()
