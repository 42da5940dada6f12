"""Linear layers that cut their product with a few rows: the same numbers, and only where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

from swarmkit.models.kernels import cut_linear
from swarmkit.models.kernels.cut_linear import CUTS, CutLinear, cut_product, use_cuts

IN, OUT = 512, 768


def layer(bias: bool = True, outputs: int = OUT, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, outputs, bias=bias, dtype=dtype).requires_grad_(False)


Timed = Callable[[Sequence[Callable[[], object]]], list[float]]


def timed_as(monkeypatch: pytest.MonkeyPatch, seconds: Timed) -> Iterator[None]:
    monkeypatch.setattr(cut_linear, "measured_seconds", seconds)
    cut_linear.fastest_cuts.cache_clear()
    yield
    cut_linear.fastest_cuts.cache_clear()


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time runs so that each work takes half as long as the one before: the last cut is the fastest."""
    yield from timed_as(monkeypatch, lambda works: [2.0**-number for number in range(len(works))])


@pytest.fixture
def as_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from timed_as(monkeypatch, lambda works: [1.0] * len(works))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [1, 2, 7, 48])
def test_a_cut_product_is_the_product(rows: int, cut: int) -> None:
    given, weight = torch.randn(rows, IN), layer().weight
    assert torch.allclose(cut_product(given, weight, cut), given @ weight.T, atol=1e-5)


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (3, 7, IN), (2, 1, 33, IN), (0, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_the_plain_one_gives(shape: tuple[int, ...], bias: bool) -> None:
    given, plain = torch.randn(*shape), layer(bias)
    assert torch.allclose(CutLinear.of(plain, [16] * 49)(given), plain(given), atol=1e-5)


def test_it_has_the_very_weights_of_the_plain_one() -> None:
    plain = layer()
    assert CutLinear.of(plain, [16]).weight is plain.weight


def test_gradients_are_those_of_the_plain_layer() -> None:
    given, plain = torch.randn(3, IN, requires_grad=True), layer()
    (found,) = torch.autograd.grad(CutLinear.of(plain, [16] * 9)(given).sum(), given)
    (expected,) = torch.autograd.grad(plain(given).sum(), given)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("faster")
def test_layers_are_exchanged_where_a_cut_is_faster() -> None:
    model = nn.Sequential(layer(), nn.Sequential(layer()))
    assert use_cuts(model) == 2
    assert isinstance(model[0], CutLinear)


@pytest.mark.usefixtures("faster")
def test_one_row_and_many_are_never_cut() -> None:
    model = nn.Sequential(layer())
    use_cuts(model)
    cut_of = model[0].cut_of
    assert (cut_of[0], cut_of[1], len(cut_of)) == (0, 0, 49)
    assert set(cut_of[2:]) == {CUTS[-1]}


@pytest.mark.usefixtures("as_fast")
def test_they_stay_where_no_cut_is() -> None:
    assert use_cuts(nn.Sequential(layer())) == 0


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    "other",
    [
        layer(outputs=256),
        layer(dtype=torch.bfloat16),
        layer().requires_grad_(True),
        nn.Linear(IN, 1001, bias=False).requires_grad_(False),
        nn.Linear(IN, OUT, device="meta").requires_grad_(False),
    ],
    ids=["small", "bfloat16", "trained", "indivisible", "elsewhere"],
)
def test_others_stay_as_they_are(other: nn.Linear) -> None:
    assert use_cuts(nn.Sequential(other)) == 0


def test_what_is_measured_is_a_choice_among_the_cuts() -> None:
    cut_linear.fastest_cuts.cache_clear()
    assert set(cut_linear.fastest_cuts(OUT, IN, 1)) <= {0, *CUTS}
