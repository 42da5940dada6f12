"""Which differences between the outputs of two servers rounding explains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swarmkit.client.checks.agreement import excess
from swarmkit.net.protocol import codec


def hidden(seed: int, tokens: int = 7) -> Tensor:
    return torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(seed))


INPUTS = hidden(0)
OUTPUT = INPUTS + 0.2 * hidden(1)
"""Blocks add a fifth of what is there."""


def apart(other: Tensor, *precisions: str, **options: object) -> float:
    first, second = precisions or ("float32", "float32")
    return excess(OUTPUT, other, INPUTS, blocks=4, precisions=(first, second), **options)  # type: ignore[arg-type]


def off_by(share: float) -> Tensor:
    return OUTPUT + share * OUTPUT.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(
        hidden(2), dim=-1
    )


@pytest.mark.parametrize("other", [OUTPUT, off_by(1e-6), off_by(1e-4)])
def test_float32_servers_differ_by_the_order_of_sums(other: Tensor) -> None:
    assert apart(other) <= 1


def test_rounding_to_a_precision_is_no_lie_of_servers_of_that_precision() -> None:
    rounded = OUTPUT.bfloat16().float()
    assert apart(rounded) > 1
    assert apart(rounded, "float32", "bfloat16") <= 1


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_outputs_may_have_travelled_in_a_codec(name: codec.LossyCodecName) -> None:
    assert apart(codec.passed(OUTPUT, name), codec=name) <= 1


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8", "nf4", "gptq"])
@pytest.mark.parametrize("lie", ["skipped blocks", "other blocks", "noise", "one token"])
def test_lies_are_more_than_any_precision_explains(precision: str, lie: str) -> None:
    one = OUTPUT.clone()
    one[1, 3] = hidden(5)[1, 3]
    other = {
        "skipped blocks": INPUTS,
        "other blocks": INPUTS + 0.2 * hidden(3),
        "noise": OUTPUT + 0.5 * hidden(4),
        "one token": one,
    }[lie]
    assert apart(other, precision, precision) > 1


def test_what_is_masked_does_not_count() -> None:
    other, mask = OUTPUT.clone(), torch.ones(2, 7, dtype=torch.uint8)
    other[0, :2] = 0
    mask[0, :2] = 0
    assert apart(other, mask=mask) == 0


def test_nothing_agrees_with_nothing() -> None:
    none = INPUTS[:, :0]
    assert excess(none, none, none, blocks=4, precisions=("float32", "float32")) == 0
