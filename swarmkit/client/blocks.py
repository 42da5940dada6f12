"""`model.blocks`: the remote blocks as modules, to be sliced, chained and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from swarmkit.client.adapters.model_adapters import PromptedAdapters
from swarmkit.client.adapters.prompt_rows import check_prompts
from swarmkit.client.gradients.function import FullPass, RemotePass, side_of
from swarmkit.client.session.session import Session
from swarmkit.errors import UsageError


class Blocks(nn.Module):
    """Blocks [start, stop) of a model, run by a swarm over whole sequences. Has no parameters.

    Example::

        states = model.blocks[0:3](embeddings)
        states = model.blocks[3:](my_adapter(states), attention_mask=mask)     # gradients flow through both
    """

    def __init__(
        self, remote: RemotePass, start: int, stop: int, prepare_adapters: Callable[[], None]
    ) -> None:
        """Args: prepare_adapters: has the model look for adapters; called before prompts are used."""
        super().__init__()
        self._remote = remote
        self._prepare_adapters = prepare_adapters
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Blocks]:
        """One block after the other."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, which: int | slice) -> Blocks:
        """Some of the blocks, counted from this module's first one."""
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"there is no block {which}: there are {len(self)}")
            low = which % len(self)
            return self._part(low, low + 1)
        low, high, step = which.indices(len(self))
        if step != 1 or low >= high:
            raise UsageError(f"take consecutive blocks, at least one of the {len(self)}, as in blocks[3:7]")
        return self._part(low, high)

    def _part(self, low: int, high: int) -> Blocks:
        return Blocks(self._remote, self.start + low, self.start + high, self._prepare_adapters)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        prompts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Run the blocks over hidden states `[batch, tokens, hidden]`.

        Args:
            attention_mask: `[batch, tokens]`, nonzero = attend; all of it if not given.
            position_ids: [batch or 1, tokens]; 0, 1, … if not given.
            output_hidden_states: also return the output of every block.
            prompts: deep prompts, differentiable; each block adds its own to the first tokens of its inputs.
                `[blocks, tokens, hidden]`, or `[blocks, batch, tokens, hidden]` with other ones for each row.

        Returns: `[batch, tokens, hidden]`; with `output_hidden_states` also a tuple with one for each
            block, the last of which is the same.
        """
        side = side_of(hidden_states, attention_mask, position_ids)
        whole = FullPass(self.start, self.stop, side, output_hidden_states)
        output = self._remote(hidden_states, whole, None if prompts is None else self._with(prompts))
        if not output_hidden_states:
            return output
        states = output.unbind(0)
        return states[-1], states

    def session(self, max_length: int, prompts: Tensor | None = None) -> Session:
        """A session over these blocks alone: `session.step(hidden)` takes [batch, tokens, hidden].

        Args:
            max_length: tokens per row that it may hold.
            prompts: deep prompts; see `forward`.
        """
        adapters = self._remote.adapters if prompts is None else self._with(prompts)
        return Session(self._remote.connection, max_length, adapters, (self.start, self.stop))

    def _with(self, prompts: Tensor) -> PromptedAdapters:
        check_prompts(prompts, len(self), self._remote.connection.client.model.hidden_size)
        self._prepare_adapters()
        return PromptedAdapters(self._remote.adapters, prompts, (self.start, self.stop))

    def extra_repr(self) -> str:
        return f"{self.start}:{self.stop}"
