"""The synchronous session that users hold, and the `Cache` that hands it to `generate()`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from swarmkit.client.adapters.model_adapters import ModelAdapters, PromptedAdapters
from swarmkit.client.pictures import server_pictures, session_bundle, with_times
from swarmkit.client.session import active
from swarmkit.client.session.chain import ChainSession
from swarmkit.client.session.duplicate_rows import alike_rows
from swarmkit.client.session.unsent import Unsent
from swarmkit.client.swarm.connection import Connection
from swarmkit.drawing.values import HopPicture
from swarmkit.errors import SessionError, UsageError


class Session:
    """Keys and values of a conversation, kept by the servers of a swarm over several calls.

    Made by `model.session(max_length=…)`. Inside its `with` block `model.generate()` uses it: what the
    session has seen already is not computed again, as long as the new input begins with it; where it departs
    from it, the session is rolled back to that point.

    Example::

        with model.session(max_length=2048) as session:
            first = model.generate(**tokenizer("One plus one is", return_tensors="pt"), max_new_tokens=8)
            more = torch.cat([first, tokenizer(" And", return_tensors="pt").input_ids], dim=1)
            second = model.generate(more, max_new_tokens=8)      # computes the new tokens only
    """

    def __init__(
        self,
        connection: Connection,
        max_length: int,
        adapters: ModelAdapters | PromptedAdapters | None = None,
        blocks: tuple[int, int] | None = None,
    ) -> None:
        """Open a session; servers hear of it with its first step.

        Args:
            adapters: where each step looks for the adapter of the blocks.
            blocks: the blocks [a, b) that it runs; all of the model's if not given.
        """
        if max_length < 1:
            raise UsageError(f"a session needs room for at least one token; max_length is {max_length}")
        self._connection = connection
        self._adapters = adapters
        self._blocks = blocks or (0, connection.client.model.num_blocks)
        self.chain = ChainSession(connection.client, max_length, *self._blocks)
        self._unsent: Unsent | None = None
        self._tokens: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._entered: active.Entered | None = None
        self._end = weakref.finalize(self, connection.call_soon, self.chain.close)

    @property
    def max_length(self) -> int:
        """Tokens per row that this session may hold."""
        return self.chain.max_length

    @property
    def position(self) -> int:
        """Tokens per row that it holds."""
        return self.chain.position if self._unsent is None else self._unsent.hidden.shape[1]

    @property
    def rows(self) -> int:
        """Sequences that it holds; 0 before the first step."""
        return self.chain.rows if self._unsent is None else self._unsent.hidden.shape[0]

    @property
    def connection(self) -> Connection:
        """The connection that the session runs over."""
        return self._connection

    @property
    def is_whole(self) -> bool:
        """Whether it runs all blocks of the model, so that `generate()` can use it."""
        return self._blocks == (0, self._connection.client.model.num_blocks)

    @property
    def closed(self) -> bool:
        return not self._end.alive

    @property
    def route(self) -> list[str]:
        """The servers in use, as people see them; empty before the first step."""
        return [str(hop) for hop in self.chain.route]

    def step(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all remote blocks over `hidden`, `[batch, tokens, hidden]`, appending to the session.

        Args:
            attention_mask: `[batch, position + tokens]`, nonzero = attend.
            position_ids: [batch or 1, tokens]; position, position + 1, … if not given.

        Raises: see `ChainSession.step`.
        """
        if self.closed:
            raise SessionError("the session is closed; open a new one with model.session()")
        if self._adapters is not None and self._adapters.may_exist:
            self._follow_adapters(self._adapters, hidden.shape[0])
        rows, tokens, _ = hidden.shape
        if not tokens:
            raise UsageError("a step has at least one new token, and this one has none")
        end = self.position + tokens
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (rows, end):
                raise UsageError(
                    f"the attention mask must be [{rows}, {end}] = [batch, past + new tokens], "
                    f"got {list(attention_mask.shape)}"
                )
            if not bool(attention_mask.all()):
                mask = attention_mask.to("cpu").ne(0).to(torch.uint8)
        positions = None
        if position_ids is not None:
            given = position_ids.to("cpu", torch.int64).expand(rows, tokens)
            if not torch.equal(given, torch.arange(self.position, end).expand(rows, -1)):
                positions = given
        new = hidden.detach().to("cpu")
        if self._unsent is None:
            output = self._run(new, mask, positions)
        else:
            output = self._run(*self._unsent.followed_by(new, mask, positions))[:, -tokens:]
            self._unsent = None
        self._mask = mask
        return output.to(hidden.device)

    def _follow_adapters(self, adapters: ModelAdapters | PromptedAdapters, rows: int) -> None:
        """Use the adapter that the model has now, in a step of so many rows.

        Raises:
            SessionError: the session holds keys and values of another one.
        """
        chain = self.chain
        self._choose_adapter(adapters)
        if chain.adapter is not None and not self.position and chain.adapter.begin(rows):
            self._connection.call(chain.change_adapter, chain.adapter)

    def _choose_adapter(self, adapters: ModelAdapters | PromptedAdapters) -> None:
        chain = self.chain
        if adapters.is_unchanged_since(chain.adapter):
            return
        now = adapters.current()
        if now is None and chain.adapter is None:
            return
        if now is not None and now.is_like(chain.adapter):
            chain.renew_adapter(now.for_session(chain.adapter))
            return
        if self.position:
            raise SessionError(
                "the adapter is another one than when this session began (trained, chosen or disabled), "
                "and its keys and values are of no use any more; open a new session"
            )
        self._connection.call(chain.change_adapter, now)

    def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        adapter = self.chain.adapter
        differ = self.chain.position or (adapter is not None and adapter.differs_by_row)
        alike = None if differ else alike_rows(hidden, mask, positions)
        if alike is None:
            return self._connection.call(self.chain.step, hidden, mask, positions)
        parts = (None if part is None else part[alike.first] for part in (hidden, mask, positions))
        output = self._connection.call(self.chain.step, *parts)
        self.chain.reorder(alike.order)
        return output[alike.order]

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on; reaches the servers with the next step."""
        if self._unsent is None:
            self.chain.crop(tokens)
        else:
            self._unsent = self._unsent.cropped(tokens)
        if self._tokens is not None:
            self._tokens = self._tokens[:, :tokens]

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; reaches the servers with the next step."""
        if self.chain.adapter is not None:
            self.chain.adapter.reorder(order)
        if self._unsent is None:
            self.chain.reorder(order)
        else:
            self._unsent = self._unsent.reordered(order)
        self._tokens = None
        if self._mask is not None:
            self._mask = self._mask[list(order)]

    def repeat(self, times: int) -> None:
        """Row i becomes rows i * times to (i + 1) * times - 1."""
        if times > 1:
            self.reorder([row for row in range(self.rows) for _ in range(times)])

    def align(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> int:
        """Roll back to where `tokens`, `[batch, length]` departs from what the session has seen.

        At least one token of `tokens` stays to be computed, because its output is needed.

        Returns: how many positions are kept.
        """
        kept = 0
        if self._tokens is not None and self._tokens.shape[0] == tokens.shape[0]:
            limit = min(self.position, self._tokens.shape[1], tokens.shape[1] - 1)
            same = (self._tokens[:, :limit] == tokens[:, :limit].cpu()).all(dim=0)
            if self._mask is not None or mask is not None:
                same &= (_columns(self._mask, tokens, limit) == _columns(mask, tokens, limit)).all(dim=0)
            kept = int(same.int().cumprod(dim=0).sum())
        self.crop(kept)
        return kept

    def remember(self, tokens: torch.Tensor | None) -> None:
        """Note the token ids `[batch, length]` of the session's positions; None = not known."""
        self._tokens = None if tokens is None else tokens.detach().to("cpu").clone()

    def fork(self) -> Session:
        """A session that holds what this one holds; from here on the two are independent.

        Its first step sends what this one was given, except where servers have kept the pages of this one.

        Raises:
            SessionError: it is closed, or keeps nothing to survive a lost server with.
        """
        if self.closed:
            raise SessionError("the session is closed; open a new one with model.session()")
        other = Session(self._connection, self.max_length, self._adapters, self._blocks)
        if self.chain.adapter is not None:
            other.chain.renew_adapter(self.chain.adapter.for_session())
        other._tokens, other._mask = self._tokens, self._mask
        if self._unsent is not None:
            other._unsent = self._unsent
        elif self.position:
            other._unsent = Unsent(self._connection.call(self._inputs), self.chain.positions)
        return other

    async def _inputs(self) -> torch.Tensor:
        return self.chain.inputs()

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        return self.fork()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError(
            "a session is a connection to servers and cannot be pickled; open another one with "
            "model.session() in the process that is to use it, or copy this one with session.fork()"
        )

    def close(self) -> None:
        """End the session; the servers free their caches. May be called twice."""
        self._end()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"route: {' -> '.join(self.route) or 'none yet'}"
        name = self._connection.client.model.name
        return f"<Session of {name}: {self.position} of {self.max_length} tokens; {state}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: a picture of the route, and where the time of the last step went."""
        client = self._connection.client
        route = [
            HopPicture(hop.server.peer_id, hop.server.label, hop.start, hop.stop) for hop in self.chain.route
        ]
        steps = [step for step in list(client.trace) if step.owner == self.chain.owner]
        return session_bundle(
            repr(self),
            client.model.name,
            client.model.num_blocks,
            with_times(route, steps[-1] if steps else None),
            server_pictures(client.known.servers()),
            self.position,
        )

    def __enter__(self) -> Session:
        if self.closed:
            raise SessionError("the session is closed; open a new one with model.session()")
        self._entered = active.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active.leave(self, self._entered)
        self._entered = None
        self.close()


class SwarmCacheLayer(CacheLayerMixin):
    """One cache layer for all remote blocks: its length is the session's, its edits go there."""

    is_sliding = False
    is_croppable = True

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __deepcopy__(self, memo: dict[int, object]) -> SwarmCacheLayer:
        """transformers' recipe for many answers to one prompt: a copy of its cache for each of them."""
        return SwarmCacheLayer(self.session.fork())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UsageError("keys and values live on the servers; nothing is cached here")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise UsageError("keys and values live on the servers; nothing is cached here")

    def get_seq_length(self) -> int:
        return self.session.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.session.position + query_length, 0

    def get_max_length(self) -> int:
        return self.session.max_length

    def reset(self) -> None:
        self.session.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions (transformers counts downwards)."""
        if tokens_to_remove > 0:
            raise UsageError("crop takes how many tokens to remove as a negative number")
        self.session.crop(max(0, self.session.position + tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.session.position:
            self.session.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.session.position:
            self.session.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.session.position:
            self.session.reorder(indices.tolist())


class SwarmCache(Cache):
    """A Hugging Face cache whose keys and values are kept by the servers of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[SwarmCacheLayer(session)])


def session_of(cache: Cache | None) -> Session | None:
    """The session behind a cache; None if the cache is not a `SwarmCache`."""
    layers = getattr(cache, "layers", None)
    return layers[0].session if layers and isinstance(layers[0], SwarmCacheLayer) else None


def _columns(mask: torch.Tensor | None, tokens: torch.Tensor, limit: int) -> torch.Tensor:
    if mask is None:
        return torch.ones(tokens.shape[0], limit, dtype=torch.bool)
    return mask[:, :limit].to("cpu").ne(0)
