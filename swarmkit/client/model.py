"""`SwarmModelForCausalLM`: the Hugging Face model itself, with its blocks served by a swarm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from swarmkit.client import viewing
from swarmkit.client.adapters.mixin import AdapterMixin
from swarmkit.client.adapters.model_adapters import ModelAdapters
from swarmkit.client.adapters.peft_config import refuse_prefixes
from swarmkit.client.blocks import Blocks
from swarmkit.client.generation import LengthLimit, prompt_length, without_cache_implementation
from swarmkit.client.gradients.exchange import Traffic
from swarmkit.client.gradients.function import RemotePass
from swarmkit.client.head.served_head import ServedHead
from swarmkit.client.pictures import server_pictures, swarm_bundle
from swarmkit.client.refusals import RefusalsMixin, hub_options
from swarmkit.client.remote_blocks import RemoteBlocks, record_states
from swarmkit.client.routing.route import describe
from swarmkit.client.session.active import active_session
from swarmkit.client.session.session import Session, SwarmCache, session_of
from swarmkit.client.speculation.assistants import (
    Speculation,
    SpeculationCount,
    Speculator,
    choose_way,
    named_arguments,
)
from swarmkit.client.status import ServerStatus, servers_of
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.client.swarm.connection import AloneHost, ClientHost, Connection
from swarmkit.errors import UsageError
from swarmkit.events import Event, StepFinished, Subscription
from swarmkit.models.architecture.anatomy import cache_argument
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.device import ensure_device
from swarmkit.models.head.head import build_head
from swarmkit.models.head.head_kind import HeadKind
from swarmkit.net.connect import TransportFactory, over_hivemind
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.settings import ClientSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    _Base = PreTrainedModel
else:
    _Base = object

_DEFAULT_LENGTH = 2**20


@dataclass
class _GenerateCall:
    """What one call of `generate()` tells the hooks that transformers calls in it.

    Attributes:
        held: tokens that the session held before an assisted call; 0 after its first step.
        asks_for_logits: whether servers may compute the output layer.
    """

    speculation: Speculation = "auto"
    held: int = 0
    asks_for_logits: bool = False


_call: ContextVar[_GenerateCall | None] = ContextVar("swarmkit_generate_call", default=None)
"""The innermost call of `generate()` under way in this thread."""


class SwarmModel(AdapterMixin, RefusalsMixin, _Base):  # type: ignore[misc]
    """What all models have whose blocks are served by others."""

    _swarm: Connection
    _checkpoint: Checkpoint
    speculator: Speculator
    _remote: RemotePass
    served_head: ServedHead
    _head = HeadKind("causal")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        initial_peers: Sequence[str] = (),
        transport: TransportFactory | None = None,
        node: ClientHost | None = None,
        swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
        identity_path: str | os.PathLike[str] | None = None,
        allowed_servers: Sequence[str] = (),
        blocked_servers: Sequence[str] = (),
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        settings: ClientSettings | None = None,
        **hub: Any,
    ) -> Self:
        """Load embeddings and head, and join the swarm that serves the blocks.

        Args:
            model: `"tiny-chat"`, a local folder, a Hub repo id, or an opened `Checkpoint`.
            initial_peers: addresses of peers of the swarm, as `swarmkit serve` and `bootstrap` print them.
            transport: another way to reach the swarm; over hivemind if not given.
            node: a `Node` that runs in this process, whose connection to the swarm is used then.
            swarm_key: the file with the key of a private swarm, as `swarmkit swarm-key` writes one. Not used
                with `transport` or `node`.
            identity_path: a file that keeps this client's key, so that servers know it again. Not used with
                `node`.
            allowed_servers, blocked_servers: peer ids of the only servers to use, and of servers never to
                use, in place of those in the settings.
            dtype: of embeddings, head and the hidden states sent; `"auto"` = float32 on CPU.
            hub: `revision` and `token`, for models from the Hub; for a classifier also entries of its config,
                such as `num_labels`.

        Raises:
            ModelError: the checkpoint cannot be found or read.
            TransportError: no initial peer answered.
        """
        if not initial_peers and transport is None and node is None:
            raise UsageError(
                "which swarm? give initial_peers=[…] (the address that `swarmkit serve` prints), "
                "or start one here with swarmkit.LocalSwarm(…)"
            )
        ensure_device(device)
        kind, others = cls._head.taken_from(hub)
        checkpoint = Checkpoint.open(model, **hub_options(others))
        reference = ModelRef(
            checkpoint.name, checkpoint.fingerprint, checkpoint.num_blocks, checkpoint.hidden_size
        )
        host = node or AloneHost(
            transport or over_hivemind(initial_peers, client_mode=True, swarm_key=swarm_key),
            identity=Identity.load_or_create(Path(identity_path)) if identity_path else None,
        )
        lists = {"allowed_servers": tuple(allowed_servers), "blocked_servers": tuple(blocked_servers)}
        if given := {name: peers for name, peers in lists.items() if peers}:
            settings = (settings or ClientSettings()).replace(**given)
        connection = Connection(lambda: SwarmClient(reference, settings), host)
        try:
            length = _length_limit(checkpoint.config)
            adapters = ModelAdapters()
            remote = RemotePass(connection, adapters)
            blocks = RemoteBlocks(
                remote,
                lambda: Session(connection, length, adapters),
                _first_attention_type(checkpoint.config),
            )
            head = build_head(checkpoint, blocks, dtype=dtype, device=device, mixin=cls, kind=kind)
            record_states(head, blocks)
        except BaseException:
            connection.close()
            raise
        assert isinstance(head, cls)
        head._swarm = connection
        head._checkpoint = checkpoint
        head.speculator = Speculator()
        head._remote_adapters = adapters
        head._remote = remote
        if kind.name == "causal":
            head.served_head = ServedHead(head, connection)
        return head

    # ------------------------------------------------------------------ the swarm

    def extra_repr(self) -> str:
        """What `repr` says before the modules: which model this is, and which servers have its blocks."""
        reference = self._swarm.client.model
        return describe(reference.name, reference.num_blocks, self._swarm.client.known.servers())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: which model this is, and a picture of the servers that have its blocks."""
        reference = self._swarm.client.model
        servers = server_pictures(self._swarm.client.known.servers())
        text = f"<{type(self).__name__} of {self.extra_repr()}>"
        return swarm_bundle(text, reference.name, reference.num_blocks, servers)

    @property
    def servers(self) -> tuple[ServerStatus, ...]:
        """The servers of this model's blocks, which are asked for their load and their free cache now."""
        return self._swarm.call(servers_of, self._swarm.client)

    @property
    def trace(self) -> list[StepFinished]:
        """The last steps, oldest first: which server took how long in queue, compute and network."""
        return list(self._swarm.client.trace)

    @property
    def events(self) -> list[Event]:
        """The last changes of routes, oldest first."""
        return self._swarm.client.events.history

    def subscribe(self, capacity: int = 1024, *kinds: type[Event]) -> Subscription:
        """Have all events from now on, steps and micro-batches among them, to read in any thread.

        Args:
            capacity: how many unread events are held at most; then the oldest are dropped and counted.
            kinds: only these kinds of events; all if none is given.
        """
        return self._swarm.client.events.subscribe(capacity, *kinds)

    @property
    def speculation(self) -> SpeculationCount:
        """How many tokens were drafted so far, and how many of them were accepted."""
        return self.speculator.count

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return self._checkpoint.tokenizer()

    @property
    def blocks(self) -> Blocks:
        """The remote blocks as modules: `model.blocks[3:7](hidden)`, differentiable; see `Blocks`."""
        return Blocks(self._remote, 0, self._checkpoint.num_blocks, self.prepare_adapters)

    @property
    def traffic(self) -> Traffic:
        """What calls without a session have sent and received so far, training above all."""
        return self._remote.training.traffic

    def session(self, max_length: int | None = None) -> Session:
        """A session that keeps its cache over several calls; see `Session`.

        Args:
            max_length: tokens per row that it may hold; what the model can take if not given.
        """
        length = _length_limit(self.config) if max_length is None else max_length
        return Session(self._swarm, length, self._remote_adapters)

    def clear_prefix_cache(self) -> None:
        """Forget what ended sessions sent and received: the next session sends all of its tokens."""
        self._swarm.call(self._swarm.client.clear_prefix_cache)  # after the ends of sessions before

    @property
    def closed(self) -> bool:
        """Whether it has left the swarm."""
        return self._swarm.closed

    def close(self) -> None:
        """Leave the swarm. Done by itself when the model is forgotten or the program ends."""
        self._swarm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SwarmModelForCausalLM(SwarmModel):
    """A causal language model whose blocks are served by others.

    An instance *is* the model's ordinary class (`LlamaForCausalLM`, …): `generate()`, logits processors,
    streamers and chat templates work as they are. Embeddings and LM head are here, the blocks are not.
    Gradients flow through the blocks, whose weights stay as they are: prompts and adapters can be trained.

    Example::

        model = SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=[address])
        model.generate(**model.tokenizer()("Hello", return_tensors="pt"), max_new_tokens=20)
    """

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        speculation: Speculation | None = None,
        view: Any = False,
        **kwargs: Any,
    ) -> Any:
        """`transformers`' own `generate()`, over a session.

        The session is `session=…`, or the one whose `with` block encloses the call, or one for this call.
        A cache may be given as `past_key_values` or as `cache`, whatever transformers calls it.

        Args:
            speculation: draft tokens ahead, a number of them that adapts to what pays; see
                docs/speculation.md. `"auto"`: where the answer is the same without. `"prompt-lookup"`: also
                where tokens are sampled. `"off"`: never, and `assistant_model=` or
                `prompt_lookup_num_tokens=` do what they do in transformers; otherwise these say where draft
                tokens come from, and how many there are at most. As in `ClientSettings` if not given.
            view: in a notebook, show the way through the swarm and the text while it comes: True, or the
                `PipelineView` that is to show it. An interrupt then ends the answer, and what came until
                then is returned.

        Where the answer would become longer than the session can hold, it ends there, with a warning.

        Raises:
            UsageError: speculation is wished for where it is impossible.
            SessionError: the prompt is longer than the session can hold.
        """
        usual = self._swarm.client.settings.sessions.speculation
        session = kwargs.pop("session", None) or active_session(self._swarm)
        if session is not None and not session.is_whole:
            raise UsageError("a session over some blocks has step() only; generate() needs model.session()")
        kwargs = named_arguments(args, kwargs)
        if view:
            own = {"inputs": inputs, "speculation": speculation, "session": session}
            return viewing.show(self, kwargs | own, view)
        name = self._name_cache(kwargs)
        tokens = inputs if inputs is not None else kwargs.get("input_ids")
        if session is not None and tokens is None and kwargs.get("inputs_embeds") is None:
            inputs = tokens = self._first_token(kwargs)
        options = kwargs

        def configured(name: str) -> Any:
            return self._configured(options, name)

        kwargs = without_cache_implementation(kwargs, configured, self.generation_config)
        limit = self._limit(session, name, tokens, kwargs)
        if limit is not None:
            kwargs = limit.apply(kwargs, configured)
        refuse_prefixes(self)
        rows = tokens.shape[0] if tokens is not None else None
        kwargs = choose_way(
            speculation, usual, kwargs, lambda name: self._configured(kwargs, name), rows, self._is_stateful
        )
        asks = "custom_generate" not in kwargs and self.served_head.is_offered(self)
        token = _call.set(_GenerateCall(speculation or usual, asks_for_logits=asks))
        try:
            with self.served_head.of_call(asks):
                output = self._generate(session, name, inputs, tokens, kwargs)
        finally:
            _call.reset(token)
        if limit is not None:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            limit.tell(sequences.shape[1] - (0 if tokens is None else tokens.shape[1]), configured)
        return output

    def _first_token(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """What transformers begins with where no prompt is given; None if the model has no such token."""
        first = self._configured(kwargs, "bos_token_id")
        return None if first is None else torch.tensor([[int(first)]], device=self.device)

    def _limit(
        self, session: Session | None, name: str, tokens: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> LengthLimit | None:
        """What the call's session can hold; None where there is none."""
        session = session or session_of(kwargs.get(name))
        if session is None and kwargs.get("use_cache") is False:
            return None
        most = _length_limit(self.config)
        held = most if session is None else session.max_length
        return LengthLimit(prompt_length(tokens, kwargs.get("inputs_embeds")), held, held >= most)

    def _generate(
        self,
        session: Session | None,
        name: str,
        inputs: torch.Tensor | None,
        tokens: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        if session is None:
            return self._generate_once(name, inputs, **kwargs)
        if kwargs.pop(name, None) is not None:
            raise UsageError("give either a session or past_key_values, not both")
        if tokens is None:
            raise UsageError("a session needs token ids: give input_ids, not inputs_embeds")
        if session.align(tokens, kwargs.get("attention_mask")):
            # `generate()` repeats each prompt once per beam or answer, but not a cache that it is given.
            answers = self._option(kwargs, "num_return_sequences")
            session.repeat(max(self._option(kwargs, "num_beams"), answers))
        session.remember(None)
        output = self._plain_generate(inputs, **{name: SwarmCache(session)}, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        session.remember(sequences if self._rows_are_sequences(session, sequences, tokens, kwargs) else None)
        return output

    def _generate_once(self, name: str, inputs: torch.Tensor | None, **kwargs: Any) -> Any:
        """Generate over a session that ends with the call, unless the caller keeps the cache."""
        if kwargs.get(name) is not None or kwargs.get("use_cache") is False:
            return self._plain_generate(inputs, **kwargs)
        kwargs.pop(name, None)
        with_cache = self.session()
        try:
            output = self._plain_generate(inputs, **{name: SwarmCache(with_cache)}, **kwargs)
        except BaseException:
            with_cache.close()
            raise
        if session_of(getattr(output, name, None)) is not with_cache:
            with_cache.close()
        return output

    def _name_cache(self, kwargs: dict[str, Any]) -> str:
        """Call a given cache what the model does; returns that name."""
        name = cache_argument(type(self))
        for other in {"past_key_values", "cache"} - {name}:
            if other in kwargs:
                if kwargs.get(name) is not None:
                    raise UsageError("past_key_values and cache are the same; give one of them")
                kwargs[name] = kwargs.pop(other)
        return name

    def _plain_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        inner = super()._get_candidate_generator(**kwargs)  # type: ignore[misc]
        session = session_of(kwargs["model_kwargs"].get(cache_argument(type(self))))
        call = _call.get() or _GenerateCall()
        call.held = session.position if session else 0
        if call.speculation == "off":
            return inner
        return self.speculator.adapt(inner, session, kwargs["generation_config"].max_length)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        return self.served_head.wrapped(processors, generation_config)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What a step computes. An assisted call's first one would compute what its session holds again."""
        call, text = _call.get(), input_ids.shape[1]
        if call is not None and call.asks_for_logits:
            self.served_head.prepared(input_ids)
        if call is not None and call.held:
            held, call.held = call.held, 0
            mask = kwargs.get("attention_mask")
            is_whole = mask is None or mask.shape[1] == text
            if kwargs.get("next_sequence_length") is None and held < text and is_whole:
                kwargs["next_sequence_length"] = text - held
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]

    def _configured(self, kwargs: dict[str, Any], name: str) -> Any:
        """An option of `generate()`, wherever it is given; None if nowhere."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _option(self, kwargs: dict[str, Any], name: str) -> int:
        """A number of `generate()`, wherever it is given; 1 if nowhere."""
        return self._configured(kwargs, name) or 1

    def _rows_are_sequences(
        self, session: Session, sequences: torch.Tensor, tokens: torch.Tensor, kwargs: dict[str, Any]
    ) -> bool:
        """Whether the cache's rows hold the very tokens of the sequences: not so after beam search."""
        same_rows = sequences.shape[0] == tokens.shape[0] == session.rows
        return self._option(kwargs, "num_beams") == 1 and same_rows and sequences.shape[1] >= session.position


class SwarmModelForSequenceClassification(SwarmModel):
    """A classifier of whole sequences whose blocks are served by others.

    An instance *is* the model's ordinary class (`LlamaForSequenceClassification`, …). Its `score` layer is
    here and can be trained; it is new, from torch's random numbers, unless the checkpoint has one.

    Example::

        model = SwarmModelForSequenceClassification.from_pretrained(
            "tiny-chat", initial_peers=[address], num_labels=2
        )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    """

    _head = HeadKind("classifier")


def _length_limit(config: Any) -> int:
    """Tokens per row that a model can take."""
    return getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH


def _first_attention_type(config: Any) -> str:
    types = getattr(config, "layer_types", None)
    return types[0] if types else "full_attention"
