"""How clients' adapters come to a server: checked against its blocks before they are kept.

Header first: the form must fit the blocks, and the bytes the quota, before memory is spent; then values and
hash. What is refused changes nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import anyio.to_thread
from transformers import PreTrainedConfig

from swarmkit.errors import AdapterError, PeerError
from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Lora
from swarmkit.models.adapters.files import SavedAdapter, fetch_adapter
from swarmkit.models.architecture.anatomy import anatomy_of
from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import AdapterKept, PutAdapter, decoder, next_state
from swarmkit.net.protocol.messages import HIDDEN_DTYPES
from swarmkit.net.rpc.conversation import Conversation, Received
from swarmkit.net.transport.seam import Stream
from swarmkit.server.adapters.store import AdapterStore, Hold, NoRoomError
from swarmkit.server.caller import Caller
from swarmkit.server.engine.engine import Engine, EngineClosedError
from swarmkit.server.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.server.sessions.session import Refusal
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_MAX_STREAMS = 256


def held(store: AdapterStore, name: str, start: int, stop: int) -> Hold | None:
    """The adapter of that name for blocks [start, stop), in use from now on; None for no name.

    Raises:
        Refusal: it is not here, or is for other blocks.
    """
    if not name:
        return None
    hold = store.hold(name)
    if hold is None:
        raise Refusal("no_adapter", f"the adapter {name[:16]}… is not kept here; send it first")
    spec = hold.adapter.spec
    if not spec.start <= start < stop <= spec.stop:
        hold.release()
        raise Refusal(
            "bad_adapter",
            f"the adapter {name[:16]}… is for blocks {spec.start}:{spec.stop}, not {start}:{stop}",
        )
    return hold


class AdapterService:
    """Takes adapters from any number of clients."""

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        engine: Engine,
        settings: ServerSettings,
        intake: ReceiveBudget,
        store: AdapterStore,
    ) -> None:
        self._stage = stage
        self._fingerprint = fingerprint
        self._engine = engine
        self._settings = settings
        self._intake = intake
        self._store = store
        self.streams = 0

    async def serve(self, stream: Stream) -> None:
        """One stream's life. Never raises on account of the peer."""
        timeout = self._settings.requests.message_timeout_s
        conversation = Conversation(stream, self._store.capacity_bytes, timeout, decoder)
        caller = Caller(conversation, self._settings, too_large="over_quota")
        self.streams += 1
        try:
            if self.streams > _MAX_STREAMS:
                await caller.refuse(Refusal("busy", "too many streams; try another server"))
            else:
                await caller.answer_all(lambda: self._answer_next(caller))
            await caller.linger()
        except (PeerError, TimeoutError) as error:
            logger.debug("adapters from %s ended: %s", stream.peer_id[-6:], error)
        finally:
            self.streams -= 1
            caller.close()

    async def _answer_next(self, caller: Caller) -> None:
        owner = caller.peer_id
        with ReceiveReservation(self._intake) as incoming:
            received = await caller.receive(
                lambda message: self._admit(owner, message, incoming), self._settings.requests.idle_timeout_s
            )
            await caller.send(AdapterKept(await self._keep(owner, received)))

    async def _admit(self, owner: str, message: object, incoming: ReceiveReservation) -> None:
        """All that the header alone can tell, before memory is spent on the payload."""
        next_state("idle", message)
        self._check(cast(PutAdapter, message))
        nbytes = cast(PutAdapter, message).values.nbytes
        try:
            self._store.check_room(owner, nbytes)
        except NoRoomError as error:
            raise Refusal("over_quota" if error.quota else "busy", str(error)) from None
        try:
            await incoming.take(nbytes, self._settings.requests.message_timeout_s)
        except TimeoutError:
            raise Refusal("busy", "too many large messages are under way; try another server") from None

    def _check(self, message: PutAdapter) -> None:
        stage = self._stage
        if message.fingerprint != self._fingerprint:
            raise Refusal(
                "wrong_model",
                f"the adapter is for the model {message.fingerprint}, this server serves {self._fingerprint}",
            )
        if not stage.start <= message.start < message.stop <= stage.stop:
            raise Refusal(
                "blocks_not_held",
                f"blocks {message.start}:{message.stop} are not inside the served {stage.start}:{stage.stop}",
            )
        try:
            spec = _spec_of(message)
            stage.fittings.check(spec, self._settings.adapters.adapter_max_rank)
            expected = stage.fittings.numel(spec)
        except AdapterError as error:
            raise Refusal("bad_adapter", str(error)) from None
        values = message.values
        if values.shape != (expected,):
            raise Refusal(
                "bad_adapter",
                f"an adapter of this form has {expected} values, got {list(values.shape)}; "
                "it may be for another model",
            )
        if values.dtype not in HIDDEN_DTYPES or values.codec != "none" or not message.name:
            raise Refusal("bad_adapter", f"an adapter's values are one of {HIDDEN_DTYPES}, and have a name")

    async def _keep(self, owner: str, received: Received) -> str:
        message = cast(PutAdapter, received.message)
        adapter = await anyio.to_thread.run_sync(self._decoded, message, received)
        if self._stage.device.type != "cpu":
            device = self._stage.device
            try:
                adapter = (await self._engine.run(lambda: adapter.to(device))).value
            except EngineClosedError:
                raise Refusal("leaving", "this server has stopped computing; use another one") from None
        try:
            self._store.put(owner, message.name, adapter)
        except NoRoomError as error:
            raise Refusal("over_quota" if error.quota else "busy", str(error)) from None
        return message.name

    def _decoded(self, message: PutAdapter, received: Received) -> Adapter:
        values = received.tensor(message.values)
        if not codec.is_finite(values):
            raise Refusal("not_finite", "the adapter contains NaN or infinity; nothing of it was kept")
        adapter = Adapter(_spec_of(message), values, self._stage.fittings)
        if adapter.digest != message.name:
            raise Refusal("bad_adapter", "the adapter's name is not the hash of what it is")
        return adapter


def _spec_of(message: PutAdapter) -> AdapterSpec:
    lora = tuple(Lora(*part) for part in message.lora)
    return AdapterSpec(message.start, message.stop, lora, message.prompt_tokens)


def load_hosted(path: str, config: PreTrainedConfig, stage: Stage) -> tuple[str, str, Adapter]:
    """An adapter for a server to host: its name, what people call it, and its part for the stage's blocks.

    Raises:
        AdapterError: there is none, or it does not fit the model.
    """
    folder = fetch_adapter(path)
    saved = SavedAdapter.open(folder, anatomy_of(config))
    adapter = saved.read(stage.fittings, stage.start, stage.stop)
    label = folder.resolve().name if Path(path).is_dir() else path
    return saved.digest, label, adapter.to(stage.device)
