"""`SwarmModelForCausalLM`: the Hugging Face model itself, with its blocks served by a swarm."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from swarmkit.client.blocks import Blocks
from swarmkit.client.connection import Connection
from swarmkit.client.gradients.exchange import Traffic
from swarmkit.client.gradients.function import RemotePass
from swarmkit.client.remote_blocks import RemoteBlocks
from swarmkit.client.session import Session, SwarmCache, active_session, session_of
from swarmkit.client.states import record_states
from swarmkit.client.swarm import ModelRef, SwarmClient
from swarmkit.client.trace import SessionEvent, StepTrace
from swarmkit.client.tunable import Tunable
from swarmkit.client.tuning import Tuning
from swarmkit.errors import UsageError
from swarmkit.models.checkpoint import Checkpoint
from swarmkit.models.head import build_head
from swarmkit.models.head_kind import HeadKind
from swarmkit.net.connect import TransportFactory, over_hivemind
from swarmkit.settings import ClientSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    _Base = PreTrainedModel
else:
    _Base = object

_DEFAULT_LENGTH = 2**20


class SwarmModel(Tunable, _Base):
    """What all models have whose blocks are served by others."""

    _swarm: Connection
    _checkpoint: Checkpoint
    _remote: RemotePass
    _head = HeadKind("causal")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        initial_peers: Sequence[str] = (),
        transport: TransportFactory | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        settings: ClientSettings | None = None,
        on_event: Callable[[SessionEvent], None] | None = None,
        **hub: Any,
    ) -> Self:
        """Load embeddings and head, and join the swarm that serves the blocks.

        Args:
            model: `"tiny-chat"`, a local folder, a Hub repo id, or an opened `Checkpoint`.
            initial_peers: addresses of peers of the swarm, as `swarmkit serve` and `bootstrap` print them.
            transport: another way to reach the swarm; over hivemind if not given.
            dtype: of embeddings, head and the hidden states sent; `"auto"` = float32 on CPU.
            on_event: called with each `SessionEvent`, on the event loop's thread.
            hub: `revision` and `token`, for models from the Hub; for a classifier also entries of its config,
                such as `num_labels`.

        Raises:
            ModelError: the checkpoint cannot be found or read.
            TransportError: no initial peer answered.
        """
        if not initial_peers and transport is None:
            raise UsageError(
                "which swarm? give initial_peers=[…] (the address that `swarmkit serve` prints), "
                "or start one here with swarmkit.LocalSwarm(…)"
            )
        kind, hub = cls._head.taken_from(hub)
        checkpoint = Checkpoint.open(model, **hub)
        reference = ModelRef(
            checkpoint.name, checkpoint.fingerprint, checkpoint.num_blocks, checkpoint.hidden_size
        )
        factory = transport or over_hivemind(initial_peers, client_mode=True)
        connection = Connection(lambda: SwarmClient(reference, factory, settings))
        try:
            if on_event is not None:
                connection.client.listeners.append(on_event)
            length = _length_limit(checkpoint.config)
            tuning = Tuning()
            remote = RemotePass(connection, tuning)
            blocks = RemoteBlocks(
                remote, lambda: Session(connection, length, tuning), _first_attention_type(checkpoint.config)
            )
            head = build_head(checkpoint, blocks, dtype=dtype, device=device, mixin=cls, kind=kind)
            record_states(head, blocks)
        except BaseException:
            connection.close()
            raise
        assert isinstance(head, cls)
        head._swarm = connection
        head._checkpoint = checkpoint
        head._tuning = tuning
        head._remote = remote
        return head

    # ------------------------------------------------------------------ the swarm

    @property
    def trace(self) -> list[StepTrace]:
        """The last steps, oldest first: which peer took how long in queue, compute and network."""
        return list(self._swarm.client.trace)

    @property
    def events(self) -> list[SessionEvent]:
        """The last changes of routes, oldest first."""
        return list(self._swarm.client.events)

    @property
    def connection(self) -> Connection:
        """The connection to the swarm, for those who look inside."""
        return self._swarm

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return self._checkpoint.tokenizer()

    @property
    def blocks(self) -> Blocks:
        """The remote blocks as modules: `model.blocks[3:7](hidden)`, differentiable; see `Blocks`."""
        return Blocks(self._remote, 0, self._checkpoint.num_blocks)

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
        return Session(self._swarm, length, self._tuning)

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

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' own `generate()`, over a session.

        The session is `session=…`, or the one whose `with` block encloses the call, or one for this call.
        """
        session = kwargs.pop("session", None) or active_session(self._swarm)
        if session is None:
            return self._generate_once(inputs, *args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise UsageError("give either a session or past_key_values, not both")
        tokens = inputs if inputs is not None else kwargs.get("input_ids")
        if tokens is None:
            raise UsageError("a session needs token ids: give input_ids, not inputs_embeds")
        if session.align(tokens, kwargs.get("attention_mask")):
            # `generate()` repeats each prompt once per beam or answer, but not a cache that it is given.
            answers = self._option(kwargs, "num_return_sequences")
            session.repeat(max(self._option(kwargs, "num_beams"), answers))
        session.remember(None)
        output = self._plain_generate(inputs, *args, past_key_values=SwarmCache(session), **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        session.remember(sequences if self._rows_are_sequences(session, sequences, tokens, kwargs) else None)
        return output

    def _generate_once(self, inputs: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Generate over a session that ends with the call, unless the caller keeps the cache."""
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is False:
            return self._plain_generate(inputs, *args, **kwargs)
        with_cache = self.session()
        try:
            output = self._plain_generate(inputs, *args, past_key_values=SwarmCache(with_cache), **kwargs)
        except BaseException:
            with_cache.close()
            raise
        if session_of(getattr(output, "past_key_values", None)) is not with_cache:
            with_cache.close()
        return output

    def _plain_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _option(self, kwargs: dict[str, Any], name: str) -> int:
        """A number of `generate()`, wherever it is given; 1 if nowhere."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), 1)

    def _rows_are_sequences(
        self, session: Session, sequences: torch.Tensor, tokens: torch.Tensor, kwargs: dict[str, Any]
    ) -> bool:
        """Whether the cache's rows hold the very tokens of the sequences: not so after beam search."""
        same_rows = sequences.shape[0] == tokens.shape[0] == session.chain.rows
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
