"""What compiled products of one row brought on this machine, and what that decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from swarmkit.models.kernels import blocked_linear
from swarmkit.models.kernels.blocked_linear import compare_layouts, use_blocked
from swarmkit.models.kernels.compiled_products import may_be_faster, remember_faster

IN, OUT = 512, 768
SHAPE = torch.Size([OUT, IN])

try:
    torch.ops.mkldnn._reorder_linear_weight(torch.randn(8, 8), 1)
except (AttributeError, RuntimeError):
    pytest.skip("this torch has no blocked weights", allow_module_level=True)


@pytest.fixture
def blocked_is_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocked_linear, "measured_seconds", lambda *_: [2.0, 1.0])
    blocked_linear.is_faster.cache_clear()
    yield
    blocked_linear.is_faster.cache_clear()


def model(device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, OUT, device=device)).requires_grad_(False)


def remember(faster: bool) -> None:
    remember_faster(SHAPE, torch.float32, torch.get_num_threads(), faster)


def test_what_was_not_tried_may_be_faster() -> None:
    assert may_be_faster(SHAPE, torch.float32, 1)


@pytest.mark.parametrize("faster", [True, False])
def test_what_was_tried_is_remembered(faster: bool) -> None:
    remember_faster(SHAPE, torch.float32, 1, faster)
    assert may_be_faster(SHAPE, torch.float32, 1) == faster


@pytest.mark.parametrize(
    ("shape", "dtype", "threads"),
    [((IN, OUT), torch.float32, 1), (SHAPE, torch.bfloat16, 1), (SHAPE, torch.float32, 2)],
)
def test_it_counts_for_nothing_else(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    remember_faster(SHAPE, torch.float32, 1, False)
    assert may_be_faster(torch.Size(shape), dtype, threads)


@pytest.mark.usefixtures("blocked_is_faster")
@pytest.mark.parametrize("will_compile", [True, False])
def test_weights_are_not_blocked_where_compiled_products_are_faster(will_compile: bool) -> None:
    remember(True)
    assert compare_layouts(model("meta"), torch.float32, will_compile) == (set() if will_compile else {SHAPE})
    assert use_blocked(model(), will_compile) == (0 if will_compile else 1)


@pytest.mark.usefixtures("blocked_is_faster")
def test_weights_are_blocked_where_compiled_products_were_not_faster() -> None:
    remember(False)
    assert compare_layouts(model("meta"), torch.float32, will_compile=True) == {SHAPE}
    assert use_blocked(model(), will_compile=True) == 1
