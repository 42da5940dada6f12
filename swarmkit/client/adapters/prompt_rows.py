"""Deep prompts of the rows of a batch: their shape, and which row has which."""

from __future__ import annotations

from torch import Tensor

from swarmkit.errors import UsageError


def check_prompts(prompts: Tensor, num_blocks: int, hidden_size: int) -> None:
    """Raise UsageError unless prompts are of a shape that blocks can add to their inputs."""
    shape = tuple(prompts.shape)
    if len(shape) not in (3, 4) or shape[0] != num_blocks or shape[-1] != hidden_size or 0 in shape:
        raise UsageError(
            f"deep prompts are [{num_blocks}, tokens, {hidden_size}] = [blocks, tokens, hidden], or "
            f"[{num_blocks}, rows, tokens, {hidden_size}] if each row has its own, not {list(shape)}"
        )


def order_of(prompt_rows: int, rows: int) -> tuple[int, ...] | None:
    """Whose prompts each row of a batch has; None = row i has those of row i, or all have the same.

    Where there are several times as many rows, as `generate()` repeats each prompt for its beams, those that
    follow each other share prompts.

    Raises:
        UsageError: the numbers do not fit.
    """
    if not prompt_rows or rows == prompt_rows:
        return None
    if rows % prompt_rows:
        raise UsageError(
            f"there are deep prompts for {prompt_rows} rows, and the batch has {rows}; give each row its own"
        )
    return tuple(row * prompt_rows // rows for row in range(rows))
