"""Linear layers that compute a few rows in another way: the same numbers, and only where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

from swarmkit.models.kernels import few_rows
from swarmkit.models.kernels.few_rows import PLAIN, WAYS, FewRowsLinear, multiply_rows, use_ways

IN, OUT = 512, 768


def layer(bias: bool = True, outputs: int = OUT, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, outputs, bias=bias, dtype=dtype).requires_grad_(False)


Timed = Callable[[Sequence[Callable[[], object]]], list[float]]


def timed_as(monkeypatch: pytest.MonkeyPatch, seconds: Timed) -> Iterator[None]:
    monkeypatch.setattr(few_rows, "measured_seconds", seconds)
    few_rows.fastest_ways.cache_clear()
    yield
    few_rows.fastest_ways.cache_clear()


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time runs so that each work takes half as long as the one before: the last way is the fastest."""
    yield from timed_as(monkeypatch, lambda works: [2.0**-number for number in range(len(works))])


@pytest.fixture
def as_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from timed_as(monkeypatch, lambda works: [1.0] * len(works))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 2, 7, 48])
@pytest.mark.parametrize("bias", [None, torch.randn(OUT)], ids=["without bias", "bias"])
def test_in_every_way_it_is_the_product(rows: int, way: str, bias: torch.Tensor | None) -> None:
    given, weight = torch.randn(rows, IN), layer().weight
    expected = nn.functional.linear(given, weight, bias)
    found = multiply_rows(given, weight, bias, [way] * 49)
    assert found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-5)


def test_more_rows_are_computed_in_the_last_way(monkeypatch: pytest.MonkeyPatch) -> None:
    given, weight = torch.randn(100, IN), layer().weight
    monkeypatch.setattr(few_rows, "WAYS", {"turned": lambda rows, weight, bias: rows[:, :1]})
    assert torch.equal(multiply_rows(given, weight, None, [PLAIN, PLAIN, "turned"]), given[:, :1])


def test_a_weight_that_does_not_lie_in_one_piece_is_multiplied_plainly() -> None:
    rows, weight = torch.randn(5, IN), torch.randn(IN, OUT).T
    assert torch.equal(multiply_rows(rows, weight, None, ["cut 16"] * 6), nn.functional.linear(rows, weight))


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (3, 7, IN), (2, 1, 33, IN), (0, IN)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_gives_what_the_plain_one_gives(shape: tuple[int, ...], bias: bool, way: str) -> None:
    given, plain = torch.randn(*shape), layer(bias)
    assert torch.allclose(FewRowsLinear.of(plain, [way] * 49)(given), plain(given), atol=1e-5)


def test_it_has_the_very_weights_of_the_plain_one() -> None:
    plain = layer()
    assert FewRowsLinear.of(plain, ["cut 16"]).weight is plain.weight


def test_gradients_are_those_of_the_plain_layer() -> None:
    given, plain = torch.randn(3, IN, requires_grad=True), layer()
    (found,) = torch.autograd.grad(FewRowsLinear.of(plain, ["cut 16"] * 9)(given).sum(), given)
    (expected,) = torch.autograd.grad(plain(given).sum(), given)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("faster")
def test_layers_are_exchanged_where_another_way_is_faster() -> None:
    model = nn.Sequential(layer(), nn.Sequential(layer()))
    assert use_ways(model) == 2
    assert isinstance(model[0], FewRowsLinear)


@pytest.mark.usefixtures("faster")
def test_each_number_of_rows_has_the_fastest_way() -> None:
    model = nn.Sequential(layer())
    use_ways(model)
    way_of = model[0].way_of
    assert (way_of[0], len(way_of)) == (PLAIN, few_rows.MANY_ROWS + 1)
    assert set(way_of[1:]) == {list(WAYS)[-1]}


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    "fault",
    [AttributeError("no such operation"), RuntimeError("not here"), None],
    ids=["missing", "fails", "wrong"],
)
def test_a_way_that_gives_no_product_here_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    def product(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if fault is not None:
            raise fault
        return given @ weight.T + 0.01

    monkeypatch.setattr(few_rows, "WAYS", {**WAYS, "turned": product})
    assert set(few_rows.fastest_ways(OUT, IN, torch.float32, 1)[1:]) == {"oneDNN"}


@pytest.mark.usefixtures("as_fast")
def test_they_stay_where_no_other_way_is() -> None:
    assert use_ways(nn.Sequential(layer())) == 0


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    "other",
    [
        layer(outputs=256),
        layer(dtype=torch.bfloat16),
        layer().requires_grad_(True),
        nn.Linear(IN, OUT, device="meta").requires_grad_(False),
    ],
    ids=["small", "bfloat16", "trained", "elsewhere"],
)
def test_others_stay_as_they_are(other: nn.Linear) -> None:
    assert use_ways(nn.Sequential(other)) == 0


@pytest.mark.usefixtures("faster")
def test_parts_have_equal_numbers_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "WAYS", {way: WAYS[way] for way in (PLAIN, "cut 16", "cut 128")})
    assert few_rows.fastest_ways(1001, IN, torch.float32, 1) == ()
    assert set(few_rows.fastest_ways(1008, IN, torch.float32, 1)[1:-1]) == {"cut 16"}


def test_what_is_measured_is_a_choice_among_the_ways() -> None:
    few_rows.fastest_ways.cache_clear()
    assert set(few_rows.fastest_ways(OUT, IN, torch.float32, 1)) <= set(WAYS)
