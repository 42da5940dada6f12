"""A block's decode step as a program: traced with `torch.export`, compiled by AOTInductor.

This runs in a process of its own (`build`), which has no weights: the block is made on the meta device, and
its weights are arguments of the program, as are the keys and values, so that one program serves all blocks of
a kind. What is traced is transformers' own block with its own attention, called as a packed batch is
(`swarmkit/models/execution/packed.py`): each session's keys and values lie in a static slot of their own.

::

    program(hidden       [rows, hidden]                    one token of each session
            positions    [rows]                            of each within its session
            seen...      [tokens with this one]            for each row; only its length is looked at
            keys...      [1, heads, length, dim]           each row's slot; the new token's are written there
            values...    [1, heads, length, dim]
            weights...)                                    in the order of the kind
        -> hidden        [rows, hidden]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from swarmkit.models.adapters.hooks import AdapterHooks
from swarmkit.models.architecture.anatomy import Anatomy, anatomy_of, replace
from swarmkit.models.compiled.kinds import LEAST_SEEN, BlockKind, NotCompiledError, describe, make_skeleton
from swarmkit.models.execution.packed import BatchedKeys, PackedBatch, PackedView
from swarmkit.models.kernels.blocked_linear import BlockedLinear
from swarmkit.models.kernels.few_rows import FewRowsLinear
from swarmkit.models.kernels.replace_linear import with_weights_of

INDUCTOR: Mapping[str, int | str] = {
    # What is computed between matrix products is too little for several threads. Most products and the
    # attention are torch's own, which use as many as the server is allowed.
    "cpp.threads": 1,
    # A product and a sum become one instruction where there is one.
    "cpp.enable_floating_point_contract_flag": "fast",
}
"""Settings of the compiler."""


class SlotArguments(PackedBatch):
    """One token each of several sessions, whose slots are arguments of the program that is traced."""

    def __init__(
        self, positions: Tensor, seen: Sequence[Tensor], rooms: Sequence[Sequence[Tensor]], attention: str
    ) -> None:
        """Args: rooms: each row's keys, and each row's values."""
        super().__init__([(1, 1)] * len(seen), attention)
        self._positions = positions
        self._seen = seen
        self._rooms = rooms

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        held = []
        for new, rooms in zip((keys, values), self._rooms, strict=True):
            parts = []
            for row, (room, seen) in enumerate(zip(rooms, self._seen, strict=True)):
                tokens = seen.shape[0]
                room[:, :, tokens - 1 : tokens] = new[:, :, row : row + 1]
                parts.append(room[:, :, :tokens])
            held.append(BatchedKeys(self, parts))
        return held[0], held[1]

    def mask(self, number: int, block: int) -> Tensor | None:
        return None

    def positions(self) -> Tensor:
        return self._positions


class _BlockRun(nn.Module):
    """Runs the traced block with weights that stand in for its own."""

    def __init__(self, view: PackedView) -> None:
        super().__init__()
        self.model = view.model
        self._run = view.run

    def forward(self, hidden: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
        return self._run(hidden, positions, batch)


class DecodeStep(nn.Module):
    """The program. The block is no submodule of it, so that its weights are none of the program's own."""

    def __init__(self, view: PackedView, names: Sequence[str]) -> None:
        """Args: names: of the block's parameters and buffers, in the order of the arguments."""
        super().__init__()
        self._outside = [_BlockRun(view)]
        self._names = [f"model.{name}" for name in names]
        self._attention = view.attention

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        seen: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        weights: list[Tensor],
    ) -> Tensor:
        batch = SlotArguments(positions, seen, (keys, values), self._attention)
        named = dict(zip(self._names, weights, strict=True))
        out: Tensor = torch.func.functional_call(self._outside[0], named, (hidden, positions, batch))
        return out


class RowLinear(nn.Linear):
    """A linear layer whose product with a row or two is compiled, too: a loop that reads each weight once.

    Matrix libraries do not come near a memory's speed with one row on every processor, and not near a
    cache's with a small matrix.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        # Sums over the same range become one loop.
        product = torch.stack([(self.weight * row).sum(-1) for row in rows])
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)


def make_view(kind: BlockKind, with_products: bool = False) -> PackedView:
    """A block of a kind, without memory for its weights; `with_products`: see `RowLinear`.

    Raises:
        NotCompiledError: the config does not make such a block.
    """
    config = kind.make_config()
    anatomy = anatomy_of(config)
    config._attn_implementation = kind.attention
    config.dtype = kind.torch_dtype
    base = make_skeleton(config)
    for path, form, way_of in kind.linear:
        replace(base, path, _in_form(base.get_submodule(path), form, way_of))
    made = describe(_as_kept(base, kind.torch_dtype), kind.make_config(), kind.torch_dtype, kind.rooms)
    if difference := kind.difference_from(made):
        raise NotCompiledError(f"its config makes another block than the one that is served: {difference}")
    if with_products:
        for path, layer in list(base.named_modules()):
            if isinstance(layer, nn.Linear) and not isinstance(layer, BlockedLinear):
                replace(base, path, with_weights_of(layer, RowLinear))
    return PackedView(base, anatomy, _no_adapters(base, anatomy))


def _in_form(layer: Any, form: str, way_of: tuple[str, ...]) -> nn.Module:
    """Replace a linear layer as the stage has done."""
    if form == "few rows":
        return FewRowsLinear.of(layer, way_of)
    return with_weights_of(layer, BlockedLinear)


def _as_kept(base: Any, dtype: torch.dtype) -> Any:
    """Have parameters in the dtype in which a loaded model has them; buffers keep theirs."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    return base


def _no_adapters(base: Any, anatomy: Anatomy) -> AdapterHooks:
    return AdapterHooks(dict(enumerate(base.get_submodule(anatomy.layers))), anatomy.arguments[0])


def arguments_for(kind: BlockKind, rows: int, length: int) -> tuple[Any, ...]:
    """Arguments of the right shapes. Their memory is never touched, and so takes none."""

    def rooms(number: int) -> list[Tensor]:
        heads, dim = kind.rooms[number]
        return [torch.empty(1, heads, length, dim, dtype=kind.torch_dtype) for _ in range(rows)]

    return (
        torch.empty(rows, kind.hidden_size, dtype=kind.torch_dtype),
        torch.zeros(rows, dtype=torch.int64),
        # Lengths differ, so that they are traced as different ones.
        [torch.empty(LEAST_SEEN + 3 + row, dtype=torch.bool) for row in range(rows)],
        rooms(0),
        rooms(1),
        [torch.empty(shape, dtype=getattr(torch, dtype)) for _, shape, dtype in kind.weights],
    )


@torch.no_grad()
def export_step(kind: BlockKind, rows: int, length: int, with_products: bool = False) -> ExportedProgram:
    """Trace the decode step of a kind for so many rows, in slots of `length` tokens; `with_products`: see
    `RowLinear`.
    """
    names = [name for name, _, _ in kind.weights]
    arguments = arguments_for(kind, rows, length)
    # With all of a slot, a slice would be no slice, and a program has to be the same for all lengths.
    lengths = [Dim(f"seen_{row}", min=LEAST_SEEN, max=length - 1) for row in range(rows)]
    seen = [{0: one} for one in lengths]
    fixed = [[None] * rows, [None] * rows, [None] * len(names)]
    return torch.export.export(
        DecodeStep(make_view(kind, with_products), names),
        arguments,
        dynamic_shapes=(None, None, seen, *fixed),
        strict=False,
    )


def compile_step(kind: BlockKind, rows: int, length: int, package: Path, with_products: bool = False) -> None:
    """Trace, compile and write to `package`, whose name ends in .pt2; `with_products`: see `RowLinear`."""
    program = export_step(kind, rows, length, with_products)
    if kind.linear:
        _allow_weight_arguments()
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(package),
        inductor_configs=dict(INDUCTOR),
    )


def _allow_weight_arguments() -> None:
    """Let oneDNN's products be compiled where the weights are arguments.

    Inductor expects that they are constants, because it has put them into oneDNN's order itself.
    """
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearBinary, LinearUnary

    def linear(given: Any, weight: Any, bias: Any, attribute: str, scalars: Any, algorithm: str) -> TensorBox:
        made: TensorBox = TensorBox.create(
            LinearUnary.create(given, weight, bias, attribute, scalars, algorithm)
        )
        return made

    def linear_and_sum(given: Any, other: Any, weight: Any, bias: Any, attribute: str) -> TensorBox:
        made: TensorBox = TensorBox.create(LinearBinary.create(given, other, weight, bias, attribute))
        return made

    register_lowering(torch.ops.mkldnn._linear_pointwise.default, type_promotion_kind=None)(linear)
    register_lowering(torch.ops.mkldnn._linear_pointwise.binary, type_promotion_kind=None)(linear_and_sum)
