"""How fast is a product of a few rows with a weight, in each way that swarmkit may choose?

    python benchmarks/few_rows.py --json > benchmarks/results/few-rows.json         (about a minute)

The weights have the shapes of M's blocks and of its output layer, float32, in huge pages where Linux leaves
that to programs, as a server has them. Each sweep goes through several weights, 128 MB in all, so that they
come from the memory and not from a cache; sweeps of all ways take turns. One torch thread.

Reported for each shape and number of rows: milliseconds of one product, the median of the sweeps, for each
way of `swarmkit/models/kernels/few_rows.py`, for a weight in oneDNN's blocked order (`blocked`), and for a
compiled loop (`compiled`, for as many rows as servers compile products for). `read_gb_per_s` is how fast one
thread adds up all values of the same weights: what it can read, at least; `share_of_read` is that time
divided by the time of the fastest way.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swarmkit.bench.environment import environment
from swarmkit.huge_pages import ask_for_huge_pages
from swarmkit.models.compiled.trace import INDUCTOR, RowLinear
from swarmkit.models.kernels.blocked_linear import in_blocks
from swarmkit.models.kernels.few_rows import PLAIN, WAYS, Product, onednn_product
from swarmkit.models.kernels.replace_linear import median_seconds
from swarmkit.server.engine.compiling import MOST_ROWS_WITH_PRODUCTS

SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816), (32_000, 1024))
ROWS = (1, 2, 3, 4, 8, 16, 32)
SWEPT_BYTES = 2**27
SWEEPS = 7


def compiled_loop(outputs: int, inputs: int) -> Product:
    """The product that a server's programs have for a row or two."""
    layer = RowLinear(inputs, outputs, bias=False, device="meta")

    def product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"weight": weight}, (given,))
        return found

    compiled: Product = torch.compile(product, options=dict(INDUCTOR))
    return compiled


def read(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Not a product: every weight is read, and added up."""
    return weight.sum()


@torch.inference_mode()
def measure(outputs: int, inputs: int) -> list[dict[str, Any]]:
    """The rows of a shape."""
    count = max(SWEPT_BYTES // (outputs * inputs * 4), 2)
    plain = [torch.randn(outputs, inputs) / inputs**0.5 for _ in range(count)]
    blocked = [in_blocks(weight) for weight in plain]
    found = []
    for rows in ROWS:
        torch._dynamo.reset()
        given = torch.randn(rows, inputs)
        sweeps = {name: Sweep(way, given, plain) for name, way in WAYS.items()}
        sweeps["blocked"] = Sweep(onednn_product, given, blocked)
        if rows <= MOST_ROWS_WITH_PRODUCTS:
            sweeps["compiled"] = Sweep(compiled_loop(outputs, inputs), given, plain)
        expected = sweeps[PLAIN].run()
        for name, sweep in sweeps.items():
            assert torch.allclose(sweep.run(), expected, rtol=0, atol=1e-4), f"{name}: another product"
        sweeps["read"] = Sweep(read, given, plain)
        taken_s = median_seconds([sweep.run for sweep in sweeps.values()], SWEEPS)
        ms = {name: seconds / count * 1e3 for name, seconds in zip(sweeps, taken_s, strict=True)}
        read_ms = ms.pop("read")
        fastest = min(ms, key=ms.__getitem__)
        found.append(
            {
                "shape": [outputs, inputs],
                "rows": rows,
                "ms": {name: round(value, 3) for name, value in ms.items()},
                "fastest": fastest,
                "read_gb_per_s": round(outputs * inputs * 4 / read_ms / 1e6, 1),
                "share_of_read": round(read_ms / ms[fastest], 2),
            }
        )
    return found


@dataclass(frozen=True)
class Sweep:
    """A product of some rows with each of several weights."""

    product: Product
    given: Tensor
    weights: list[Tensor]

    def run(self) -> Tensor:
        """Compute all; returns the product with the last weight."""
        for weight in self.weights:
            last = self.product(self.given, weight, None)
        return last


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ask_for_huge_pages()  # torch has allocated no tensor so far
    torch.set_num_threads(1)
    result = {
        "benchmark": "few_rows",
        **environment(),
        "command": " ".join(["python", "benchmarks/few_rows.py", *sys.argv[1:]]),
        "dtype": "float32",
        "threads": 1,
        "rows": [row for shape in SHAPES for row in measure(*shape)],
    }
    if options.json:
        print(json.dumps(result))
        return 0
    names = [*WAYS, "blocked", "compiled"]
    table = Table("weight", "rows", *(f"{name} ms" for name in names), "share of read")
    for row in result["rows"]:
        times = [f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in names]
        table.add_row(" x ".join(map(str, row["shape"])), str(row["rows"]), *times, str(row["share_of_read"]))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
