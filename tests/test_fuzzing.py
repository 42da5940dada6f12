"""Mutations of real conversations reach every endpoint, and no client beside them notices.

The conversations are those of real clients and servers: of generation with beams and padded prompts, of
prefixes that are found again, of training with LoRA, of outputs that go from server to server, of the status
page, of weights that are handed on, and of keys and values that go along when a server leaves.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import torch

import swarmkit
from swarmkit import Server, SwarmModelForCausalLM
from swarmkit.client.status import look_up_status
from swarmkit.errors import PeerError
from swarmkit.events import KeysHandedOver
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.protocol.handover_messages import HANDOVER, AwaitKeys, KeysAwaited
from swarmkit.net.protocol.messages import SESSION, GetResources, Open, Opened, Resources
from swarmkit.net.protocol.weights_messages import WEIGHTS
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.rpc import dial_back
from swarmkit.net.rpc.dial_back import ask_to_dial_back
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.server_info import ask
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.server.weights.service import WeightsService, WeightsSettings
from swarmkit.server.weights.transfer import receive_file
from swarmkit.settings import ClientSettings, ServerSettings

from .client.answers import answer, at, prompt
from .fuzzing import Conversation, Mutator, put_together, taken_apart, tapped
from .models.tiny import make_checkpoint
from .models.tuned import randomise
from .net.protocols import PROTOCOLS
from .waiting import wait_until

pytest.importorskip("peft")

AT_ONCE = 12
"""Hostile conversations that are held at a time."""
SERVER = ServerSettings().replace(
    announce_period_s=3000, record_lifetime_s=3600, report_resources=True, max_step_tokens=256,
    max_session_length=512, message_timeout_s=1.0, link_timeout_s=0.05, cache_bytes=8 * 1024**2,
    receive_budget_bytes=4 * 1024**2, max_admission_wait_s=0.2,
    adapter_bytes=1024**2, client_adapter_bytes=256 * 1024, offer_head=True,
)  # fmt: skip
CLIENT = ClientSettings().replace(refresh_period_s=3000, head="local")
PATIENCE_S = 0.1
"""For so long an attacker that waits for answers waits for one."""
ENDPOINTS = {protocol.name for protocol in PROTOCOLS}

DEEP = {
    "Opened", "StepDone", "PrefixRestored", "not_linked", "Attached", "ForwardDone", "BackwardDone",
    "AdapterKept", "FileFound", "FileChunk", "ServerInfo", "Resources", "DialedBack", "Logits",
    "KeysAwaited", "KeysWelcome", "KeysTaken", "bad_message", "illegal_message", "out_of_order", "not_finite",
}  # fmt: skip
"""What servers answer where mutations get past the first checks."""


class Target:
    """Two servers with half of the model each, a peer that hands out a file, and clients of them."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, owned: ExitStack) -> None:
        self.checkpoint = checkpoint
        self.network = MemoryNetwork()
        self.tape: list[Conversation] = []
        self.handed_tokens = 0
        """That the session held whose keys and values were handed over."""
        self.transport = tapped(over_memory(self.network), self.tape)
        self.lease = owned.enter_context(portal.lease())
        # Nothing is dialled, because peers in memory have no address, and the answer need not come late.
        owned.enter_context(pytest.MonkeyPatch.context()).setattr(dial_back, "DIAL_TIMEOUT_S", 0.05)
        self.servers = [
            Server(checkpoint, blocks=blocks, transport=self.transport, settings=SERVER)
            for blocks in ((0, 2), (2, 5))
        ]
        for server in self.servers:
            owned.callback(server.stop, 0.0)
            server.start()
        self.file = folder / "block"
        self.file.write_bytes(torch.arange(300_000, dtype=torch.int32).numpy().tobytes())
        self.content = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self.holder = self.lease.call(self._hold)
        self.plain = self.client(over_memory(self.network), owned)

    async def _hold(self) -> Any:
        transport = self.network.transport()
        service = WeightsService(WeightsSettings(idle_timeout_s=1.0))
        service.offer(self.content, self.file)
        await listen(transport, WEIGHTS, service.serve)
        return transport

    def client(
        self, transport: Any, owned: ExitStack, settings: ClientSettings = CLIENT
    ) -> SwarmModelForCausalLM:
        model = SwarmModelForCausalLM.from_pretrained(self.checkpoint, transport=transport, settings=settings)
        owned.callback(model.close)
        return model

    def record(self, folder: Path) -> list[Conversation]:
        """Hold every kind of conversation, and return what was sent."""
        with ExitStack() as owned:
            for push in (True, False):
                model = self.client(self.transport, owned, CLIENT.replace(push=push))
                answer(model, *prompt(7), new_tokens=4)
                answer(model, *prompt(5, 3), new_tokens=4, num_beams=2)
                for _ in range(2):  # the second one finds the pages of the first one
                    answer(model, prompt(70)[0], new_tokens=2)
            asking = self.client(self.transport, owned, CLIENT.replace(head="remote", head_top=4))
            answer(asking, *prompt(7), new_tokens=4)
            answer(asking, *prompt(7), new_tokens=4, num_beams=2)
            tuned = swarmkit.get_peft_model(self.client(self.transport, owned), _lora())
            randomise(tuned)
            ids, mask = prompt(6, 4)
            tuned(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
            tuned.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
            self.lease.call(self._ask_around, folder)
            spare = self._hand_over_and_back(owned)
        return [one for one in self.tape if one.frames and one.peer_id != spare]

    def _hand_over_and_back(self, owned: ExitStack) -> str:
        """Have a session's keys and values go to a third server and back; returns its peer id."""
        spare = Server(self.checkpoint, blocks=(0, 2), transport=self.transport, settings=SERVER)
        owned.callback(spare.stop, 0.0)
        spare.start()

        def leave() -> None:
            in_use = model.connection.client.trace[-1].hops[0].peer_id
            for server in (self.servers[0], spare):
                assert server.serving is not None
                server.serving.sessions.leaving = server.peer_id == in_use

        handed: list[KeysHandedOver] = []
        for _ in range(20):  # this swarm's servers reach each other at once, or not at all
            model = self.client(self.transport, owned, CLIENT.replace(hand_over="always"))
            answer(model, *prompt(7), new_tokens=9, logits_processor=at({1: leave, 5: leave}))
            handed = [event for event in model.events if isinstance(event, KeysHandedOver)]
            if {event.peer_id for event in handed} == {self.servers[0].peer_id, spare.peer_id}:
                break
        serving = self.servers[0].serving
        assert serving is not None
        serving.sessions.leaving = False
        back = next(event for event in handed if event.peer_id == spare.peer_id)
        self.handed_tokens = back.tokens
        return spare.peer_id

    async def _ask_around(self, folder: Path) -> None:
        asking = await self.transport(Identity(), lambda *_: True)
        await look_up_status(asking)
        offer = WeightsOffer(
            peer_id=self.holder.peer_id, fingerprint="0" * 32, block=0, content=self.content,
            size=self.file.stat().st_size, addresses=(), expires_at=0.0,
        )  # fmt: skip
        (folder / "partial").touch()
        assert await receive_file(
            asking, offer, BlockStore(folder), folder / "partial", 5.0, lambda nbytes: None
        )
        for server in self.servers:
            await ask(asking, server.peer_id, (), GetResources(), 5.0)
            await ask_to_dial_back(asking, server.peer_id, (), 2000, 5.0)
        await asking.close()

    def resources(self) -> list[Resources]:
        """What each server holds; what it keeps for later ones is not counted."""

        async def ask_both() -> list[Resources]:
            asking = self.network.transport()
            found = [await ask(asking, s.peer_id, (), GetResources(), 60.0) for s in self.servers]
            await asking.close()
            return found

        found = self.lease.call(ask_both)
        assert all(
            each.accounted and each.leased_bytes + each.kept_bytes <= each.capacity_bytes for each in found
        )
        # anyio keeps threads for a while that it may use again.
        threads = sum("AnyIO worker" not in thread.name for thread in threading.enumerate())
        return [msgspec.structs.replace(each, kept_bytes=0, threads=threads) for each in found]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@dataclass
class Heard:
    """Whether a server has said anything to one conversation since the last message."""

    is_due: bool
    anything: anyio.Event = field(default_factory=anyio.Event)


class Attacker:
    """Holds hostile conversations, several at a time."""

    def __init__(self, target: Target, mutator: Mutator, messages: int) -> None:
        self._target = target
        self._mutator = mutator
        self._left = messages
        self.sent = 0
        self.told: Counter[str] = Counter()
        """How often servers answered with which message, or with which fault."""
        self.reached: Counter[str] = Counter()
        """How many messages were sent to which endpoint."""
        self.broken: list[Conversation] = []
        """Those that a server had a failure of its own about."""

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(self._attack)

    async def _attack(self) -> None:
        while self._left > 0:
            conversation = self._mutator.next()
            self._left -= len(conversation.frames)
            transport = self._target.network.transport()
            try:
                with suppress(PeerError):
                    await self._hold(transport, conversation)
            finally:
                await transport.close()

    async def _hold(self, transport: Any, conversation: Conversation) -> None:
        frames = conversation.frames
        if "push" in conversation.name:  # the real conversation's session has ended: into one's own
            frames = await self._into_own_session(transport, conversation)
        if "handover" in conversation.name:
            frames = await self._with_own_ticket(transport, conversation)
        stream = await transport.open(conversation.peer_id, conversation.name)
        heard = Heard(is_due=self._mutator.waits())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen, stream, conversation, heard)
            with suppress(PeerError):
                for frame in frames:
                    heard.anything = anyio.Event()
                    await stream.send(frame)
                    self.sent += 1
                    self.reached[conversation.name.split("/")[1]] += 1
                    if heard.is_due:  # else it comes before the one before was answered
                        with anyio.move_on_after(PATIENCE_S):
                            await heard.anything.wait()
            tasks.cancel_scope.cancel()
        stream.close()

    async def _own_session(self, transport: Any, conversation: Conversation) -> Opened | None:
        """A session of the attacker's own where a conversation goes to; None if that is no server."""
        server = next((s for s in self._target.servers if s.peer_id == conversation.peer_id), None)
        if server is None:
            return None
        session = await connect(transport, SESSION, server.peer_id, max_payload_bytes=2**24)
        return await session.ask(Open(self._target.checkpoint.fingerprint, *server.blocks, 128), Opened)

    async def _into_own_session(self, transport: Any, conversation: Conversation) -> list[bytes]:
        opened = await self._own_session(transport, conversation)
        if opened is None:
            return conversation.frames
        frames = []
        for frame in conversation.frames:
            header, payload = taken_apart(frame) or ({}, b"")
            known = header.get("type") == "Attach" and isinstance(header.get("inlet"), str)
            frames.append(put_together({**header, "inlet": opened.inlet}, payload) if known else frame)
        return frames

    async def _with_own_ticket(self, transport: Any, conversation: Conversation) -> list[bytes]:
        """The same, where keys and values are brought into a session of the attacker's own."""
        opened = await self._own_session(transport, conversation)
        if opened is None:
            return conversation.frames
        ticket = ""
        frames = []
        for frame in conversation.frames:
            header, payload = taken_apart(frame) or ({}, b"")
            if header.get("type") == "BringKeys" and isinstance(header.get("ticket"), str) and not ticket:
                awaiting = await connect(transport, HANDOVER, conversation.peer_id)
                ask = AwaitKeys(opened.inlet, 1, self._target.handed_tokens, transport.peer_id)
                ticket = (await awaiting.ask(ask, KeysAwaited)).ticket
                frame = put_together({**header, "ticket": ticket}, payload)
            elif header.get("type") == "AwaitKeys" and isinstance(header.get("session"), str):
                frame = put_together({**header, "session": opened.inlet}, payload)
            frames.append(frame)
        return frames

    async def _listen(self, stream: Any, conversation: Conversation, heard: Heard) -> None:
        with suppress(PeerError):
            while True:
                header, _ = taken_apart(await stream.receive()) or ({}, b"")
                heard.anything.set()
                said = header.get("code", header.get("type", "data"))
                self.told[said] += 1
                if said == "internal":
                    self.broken.append(conversation)


def after_a_while(count: Callable[[], list[Resources]], expected: list[Resources]) -> list[Resources]:
    """What is held once it is what is expected, or as it is when that has not come about for long."""
    with suppress(AssertionError):
        wait_until(lambda: count() == expected, "the resources are as before", within=30, every=0.05)
    return count()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", max_position_embeddings=512))


@pytest.fixture(scope="module")
def target(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with ExitStack() as owned:
        yield Target(checkpoint, tmp_path_factory.mktemp("held"), owned)


@pytest.fixture(scope="module")
def conversations(target: Target, tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    return target.record(tmp_path_factory.mktemp("partial"))


def test_every_endpoint_has_real_conversations(conversations: list[Conversation]) -> None:
    assert {one.name.split("/")[1] for one in conversations} == ENDPOINTS


@pytest.mark.parametrize(
    "messages",
    [3_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_hostile_conversations_change_nothing_for_others(
    target: Target, conversations: list[Conversation], messages: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answer(load_local(target.checkpoint), *prompt(9), new_tokens=8).tolist()
    assert answer(target.plain, *prompt(9), new_tokens=8).tolist() == wanted
    before = target.resources()
    attacker = Attacker(target, Mutator(conversations, seed=messages), messages)
    caplog.set_level(logging.ERROR)

    attack = target.lease.start_task_soon(attacker.run)
    answers = []
    while not attack.done():
        answers.append(answer(target.plain, *prompt(9), new_tokens=8).tolist())
    attack.result()

    assert attacker.sent >= messages * 0.5, attacker.told
    assert attacker.broken == []
    assert set(attacker.reached) >= ENDPOINTS
    assert attacker.told.keys() >= DEEP
    assert len(answers) > 1
    assert all(tokens == wanted for tokens in answers)
    assert [record.getMessage() for record in caplog.records] == []
    assert after_a_while(target.resources, before) == before
