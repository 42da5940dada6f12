"""How clients' adapters come to a server: checked against its blocks before they are kept.

Header first: the form must fit the blocks, and the bytes the quota, before memory is spent; then values and
hash. What is refused changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
from transformers import PreTrainedConfig

from swarmkit.errors import AdapterError
from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Lora
from swarmkit.models.adapters.files import SavedAdapter, fetch_adapter
from swarmkit.models.architecture.anatomy import anatomy_of
from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import ADAPTER, AdapterKept, PutAdapter
from swarmkit.net.protocol.messages import HIDDEN_DTYPES
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.rates import PeerRates
from swarmkit.net.transport.seam import Stream
from swarmkit.server.adapters.store import AdapterStore, Hold, NoRoomError
from swarmkit.server.engine.engine import Engine
from swarmkit.settings import ServerSettings

_MAX_STREAMS = 256
_DECODED_AT_ONCE = 1
"""Adapters whose values are checked and hashed, lest they take all processors from the device's thread."""
BYTES_PER_S, BYTES_AT_ONCE = 32 * 2**20, 64 * 2**20
"""How fast one client's adapters are received: that, and to hash them, takes the time of those who decode."""


def check_rows(hold: Hold | None, rows: int) -> None:
    """Refuse sequences from the first token on unless there are as many as have prompts of their own."""
    wanted = 0 if hold is None else hold.adapter.spec.prompt_rows
    if wanted and rows != wanted:
        raise Refusal("bad_shape", f"the adapter has prompts for {wanted} rows, and the batch has {rows}")


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
        receive_budget: ReceiveBudget,
        store: AdapterStore,
    ) -> None:
        self._stage = stage
        self._fingerprint = fingerprint
        self._engine = engine
        self._settings = settings
        self._receive_budget = receive_budget
        self._store = store
        self.streams = StreamShares(_MAX_STREAMS)
        self._decoding = anyio.CapacityLimiter(_DECODED_AT_ONCE)
        self._rates = PeerRates(BYTES_PER_S, BYTES_AT_ONCE, engine.clock.now)

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends. Never raises on account of the peer."""
        caller = ServerStream(
            stream,
            ADAPTER,
            max_payload_bytes=self._store.capacity_bytes,
            message_timeout=self._settings.requests.message_timeout_s,
            too_large="over_quota",
            clock=self._engine.clock.now,
        )
        caller.idle_s = self._settings.requests.idle_timeout_s
        with self.streams.counted(caller) as refusal:
            await caller.serve(lambda incoming: self._answer(caller, incoming), refusal)

    async def _answer(self, caller: ServerStream, incoming: IncomingMessage) -> None:
        message: PutAdapter = incoming.message
        self._check(message)
        if (wait_s := self._rates.take(caller.peer_id, incoming.nbytes)) > 0:
            await anyio.sleep(wait_s)
        room = ReceiveReservation(self._receive_budget, caller.holder, caller.dismiss)
        with room, _refusing_for_room():
            self._store.check_room(caller.holder, incoming.nbytes)
            try:
                await room.take(incoming.nbytes, self._settings.requests.message_timeout_s)
            except TimeoutError:
                raise Refusal("busy", "too many large messages are under way; try another server") from None
            await incoming.payload()
            adapter = await anyio.to_thread.run_sync(self._decoded, message, incoming, limiter=self._decoding)
            if self._stage.device.type != "cpu":
                device = self._stage.device
                adapter = (await self._engine.run(lambda: adapter.to(device))).value
            self._store.put(caller.holder, message.name, adapter)
        await caller.send(AdapterKept(message.name))

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

    def _decoded(self, message: PutAdapter, incoming: IncomingMessage) -> Adapter:
        values = incoming.tensor(message.values)
        if not codec.is_finite(values):
            raise Refusal("not_finite", "the adapter contains NaN or infinity; nothing of it was kept")
        adapter = Adapter(_spec_of(message), values, self._stage.fittings)
        if adapter.digest != message.name:
            raise Refusal("bad_adapter", "the adapter's name is not the hash of what it is")
        return adapter


@contextmanager
def _refusing_for_room() -> Iterator[None]:
    """Refuse a client's adapter where there is no room for it."""
    try:
        yield
    except NoRoomError as error:
        raise Refusal("over_quota" if error.quota else "busy", str(error)) from None


def _spec_of(message: PutAdapter) -> AdapterSpec:
    lora = tuple(Lora(*part) for part in message.lora)
    return AdapterSpec(message.start, message.stop, lora, message.prompt_tokens, message.prompt_rows)


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
