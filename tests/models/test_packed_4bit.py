"""4-bit layers give gradients, also once bitsandbytes has packed their weights for inference on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swarmkit.models.quantization.packed_4bit import prepare_4bit

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(256, 64), (32, 32), (64, 48)])
def test_a_layer_that_has_computed_without_gradients_still_gives_them(
    columns: int, rows: int, nested: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    plain = nn.Linear(columns, rows)
    layer = Linear4bit(
        columns, rows, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=nested
    ).requires_grad_(False)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu")).eval()
    prepare_4bit(model)
    given = torch.randn(3, columns, requires_grad=True)
    with torch.inference_mode():
        without_gradients = model(given.detach())
    output = model(given)
    output.square().sum().backward()
    torch.testing.assert_close(output, without_gradients, atol=0.05, rtol=0.05)
    assert given.grad is not None
    wanted = 2 * output.detach() @ plain.weight.detach()
    assert torch.nn.functional.cosine_similarity(given.grad.flatten(), wanted.flatten(), dim=0) > 0.98
