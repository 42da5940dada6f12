"""Linear layers with oneDNN's own layout of the weights: the same numbers, and used only where that is so."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from swarmkit.models.kernels import blocked_linear
from swarmkit.models.kernels.blocked_linear import (
    BlockedLinear,
    compare_layouts,
    copy_for_a_while,
    use_blocked,
)
from swarmkit.models.kernels.compiled_products import remember_faster
from swarmkit.models.kernels.few_rows import onednn_product
from swarmkit.models.kernels.replace_linear import replace_linear

IN, OUT = 512, 768
SHAPE = torch.Size([OUT, IN])

try:
    torch.ops.mkldnn._reorder_linear_weight(torch.randn(8, 8), 1)
except (AttributeError, RuntimeError):
    pytest.skip("this torch has no blocked weights", allow_module_level=True)


try:
    torch.ops.mkldnn._reorder_linear_weight(torch.randn(8, 8).bfloat16(), 1)
    HAS_BFLOAT16 = True
except RuntimeError:
    HAS_BFLOAT16 = False


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time runs so that blocked weights are always faster; what they yield is looked at all the same."""
    monkeypatch.setattr(blocked_linear, "measured_seconds", lambda *_: [2.0, 1.0])
    blocked_linear.is_faster.cache_clear()
    yield
    blocked_linear.is_faster.cache_clear()


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocked_linear, "measured_seconds", lambda *_: [1.0, 1.0])
    blocked_linear.is_faster.cache_clear()
    yield
    blocked_linear.is_faster.cache_clear()


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (3, 7, IN), (2, 1, 33, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    given = torch.randn(*shape)
    assert torch.allclose(BlockedLinear.of(layer(bias))(given), layer(bias)(given), atol=1e-5)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="needs a processor with AVX512")
def test_bfloat16_products_are_those_of_the_plain_layer() -> None:
    given = torch.randn(5, IN, dtype=torch.bfloat16)
    plain = layer(dtype=torch.bfloat16)
    assert torch.allclose(BlockedLinear.of(plain)(given), plain(given), atol=2e-2)


@pytest.mark.skipif(HAS_BFLOAT16, reason="this processor has them")
def test_bfloat16_layers_stay_where_the_processor_has_no_blocked_ones(faster: None) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, dtype=torch.bfloat16).requires_grad_(False))
    assert use_blocked(model) == 0


def test_what_lies_in_another_order_is_multiplied_right() -> None:
    given = torch.randn(IN, 6).T
    assert torch.allclose(BlockedLinear.of(layer())(given), layer()(given), atol=1e-5)


def test_gradients_are_those_of_the_plain_layer() -> None:
    gradients = []
    for each in (layer(), BlockedLinear.of(layer())):
        given = torch.ones(4, IN, requires_grad=True)
        each(given).square().sum().backward()
        gradients.append(given.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_it_has_the_weights_of_the_plain_layer() -> None:
    assert torch.equal(BlockedLinear.of(layer()).weight.to_dense(), layer().weight)


@pytest.mark.usefixtures("faster")
def test_large_layers_are_exchanged_wherever_they_are() -> None:
    model = nn.Sequential(layer(), nn.ModuleDict({"down": nn.Linear(OUT, IN).requires_grad_(False)}))
    assert use_blocked(model) == 2
    assert isinstance(model[0], BlockedLinear)


@pytest.mark.usefixtures("faster")
def test_what_was_compared_before_weights_are_read_is_not_compared_again() -> None:
    compare_layouts(nn.Sequential(nn.Linear(IN, OUT, device="meta")), torch.float32)
    use_blocked(nn.Sequential(layer()))
    assert blocked_linear.is_faster.cache_info().misses == 1


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    "kept",
    [
        nn.Linear(64, 64).requires_grad_(False),
        nn.Linear(IN, OUT),
        nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False),
        nn.Linear(IN, OUT, device="meta").requires_grad_(False),
        nn.modules.linear.NonDynamicallyQuantizableLinear(IN, OUT).requires_grad_(False),
    ],
    ids=["small", "trainable", "of another dtype", "elsewhere", "of another kind"],
)
def test_layers_of_any_other_kind_stay_plain(kept: nn.Linear) -> None:
    model = nn.Sequential(kept)
    assert use_blocked(model) == 0
    assert model[0] is kept


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("will_compile", [True, False])
def test_weights_are_not_blocked_where_compiled_products_are_faster(will_compile: bool) -> None:
    remember_faster(SHAPE, torch.float32, torch.get_num_threads(), True)
    assert compare_layouts(nn.Sequential(nn.Linear(IN, OUT, device="meta")), torch.float32, will_compile) == (
        set() if will_compile else {SHAPE}
    )
    assert use_blocked(nn.Sequential(layer()), will_compile) == (0 if will_compile else 1)


@pytest.mark.usefixtures("faster")
def test_weights_are_blocked_where_compiled_products_were_not_faster() -> None:
    remember_faster(SHAPE, torch.float32, torch.get_num_threads(), False)
    assert compare_layouts(
        nn.Sequential(nn.Linear(IN, OUT, device="meta")), torch.float32, will_compile=True
    ) == {SHAPE}
    assert use_blocked(nn.Sequential(layer()), will_compile=True) == 1


@pytest.mark.usefixtures("slower")
def test_layers_stay_where_that_is_not_faster() -> None:
    assert use_blocked(nn.Sequential(layer())) == 0


@pytest.mark.usefixtures("faster")
def test_layers_stay_where_products_would_be_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_linear, "onednn_product", lambda *given: onednn_product(*given) + 0.01)
    assert use_blocked(nn.Sequential(layer())) == 0


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("error", [AttributeError("no such operation"), RuntimeError("not in this build")])
def test_layers_stay_where_torch_cannot(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def cannot(weight: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(blocked_linear, "in_blocks", cannot)
    assert use_blocked(nn.Sequential(layer())) == 0


def test_a_layer_is_let_go_before_the_next_one_is_replaced() -> None:
    model = nn.Sequential(nn.Sequential(layer(), layer()), layer())
    gone: list[bool] = []
    replaced: list[weakref.ref[nn.Linear]] = []

    def make(old: nn.Linear) -> nn.Linear:
        gone.extend(one() is None for one in replaced)
        replaced.append(weakref.ref(old))
        return BlockedLinear.of(old)

    assert replace_linear(model, make) == 3
    assert gone == [True] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's memory")
def test_memory_of_a_copy_for_a_while_is_the_systems_again() -> None:
    weight = torch.randn(1024, 1024)
    before = mappings()
    copy = copy_for_a_while(weight)
    assert torch.equal(copy, weight)
    address = copy.data_ptr()
    assert any(start <= address < stop for start, stop in mappings() - before)
    del copy
    assert not any(start <= address < stop for start, stop in mappings() - before)


def mappings() -> set[tuple[int, int]]:
    """Where this process has memory."""
    return {(one[0], one[1]) for one in map(_span, Path("/proc/self/maps").read_text().splitlines())}


def _span(line: str) -> tuple[int, int]:
    start, stop = line.split()[0].split("-")
    return int(start, 16), int(stop, 16)
