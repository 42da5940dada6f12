"""Tokens through a swarm are the tokens of the local Hugging Face model, whatever the way to generate."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.session.session import Session, SwarmCache
from swarmkit.errors import SessionError, UsageError
from swarmkit.events import following
from swarmkit.models.architecture.anatomy import cache_argument
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings

from ..models.tiny import VOCABULARY, make_checkpoint
from ..waiting import wait_until
from .answers import answer, at, prompt

WORLDS = [
    "llama over hivemind",
    "llama over memory",
    "mistral over memory",  # its sliding window is shorter than the texts
    "gemma2 over memory",
    "qwen3_moe over memory",
    "gpt_neox over memory",
]
over_hivemind = pytest.mark.parametrize("world", WORLDS[:1], indirect=True)
over_memory = pytest.mark.parametrize("world", WORLDS[1:2], indirect=True)
everywhere = pytest.mark.parametrize("world", WORLDS, indirect=True)
everywhere_slowly = pytest.mark.parametrize(
    "world",
    [WORLDS[0], *(pytest.param(world, marks=pytest.mark.slow) for world in WORLDS[1:])],
    indirect=True,
)


@dataclass
class World:
    """The same model here and in a swarm of three stages."""

    swarm: LocalSwarm
    model: SwarmModelForCausalLM
    local: PreTrainedModel
    draft: PreTrainedModel

    def caches(self, session: Session) -> list[tuple[int, int]]:
        """(rows, tokens) that each server holds for a session, which its `max_length` tells from others."""
        found = []
        for server in self.swarm.servers:
            assert isinstance(server, Server)
            service = server.serving.sessions
            assert service is not None
            found += [
                (held.cache.batch, held.cache.tokens)
                for held in service.sessions
                if held.max_length == session.max_length
            ]
        return found

    def steps_from_now(self) -> Any:
        """The steps of this model from here on."""
        trace = self.model.connection.client.trace
        trace.clear()
        return trace


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    architecture, _, transport = request.param.split()
    folder = tmp_path_factory.mktemp(architecture)
    checkpoint = Checkpoint.open(make_checkpoint(folder, architecture))
    draft = Checkpoint.open(make_checkpoint(folder, "llama", num_blocks=1, seed=1))
    patient = ClientSettings().replace(min_step_timeout_s=60)
    swarm = LocalSwarm(checkpoint, num_stages=3, transport=transport, client_settings=patient)
    with swarm:
        yield World(swarm, swarm.model(), load_local(checkpoint), load_local(draft))


def assert_same(tokens: Tensor, wanted: Tensor) -> None:
    assert tokens.tolist() == wanted.tolist()


# every way to generate


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}


def assert_same_in(world: World, way: str, *lengths: int) -> None:
    ids, mask = prompt(*lengths)
    assert_same(answer(world.model, ids, mask, **WAYS[way]), answer(world.local, ids, mask, **WAYS[way]))


@everywhere
@pytest.mark.parametrize("way", ["greedy", "beams", "prompt lookup"])
def test_tokens_equal_the_local_models(world: World, way: str) -> None:
    assert_same_in(world, way, 9)


@everywhere_slowly
@pytest.mark.parametrize("way", ["sampling", "several answers", "without a cache"])
def test_tokens_of_further_ways_equal_the_local_models(world: World, way: str) -> None:
    assert_same_in(world, way, 9)


@everywhere
def test_tokens_assisted_by_a_draft_model_equal_the_local_models(world: World) -> None:
    ids, _ = prompt(9)
    tokens = answer(world.model, ids, assistant_model=world.draft)
    assert_same(tokens, answer(world.local, ids, assistant_model=world.draft))


@everywhere
def test_a_left_padded_batch_equals_the_local_models(world: World) -> None:
    assert_same_in(world, "greedy", 9, 4, 7)


@everywhere_slowly
@pytest.mark.parametrize("way", ["sampling", "beams"])
def test_a_left_padded_batch_equals_the_local_models_in_further_ways(world: World, way: str) -> None:
    assert_same_in(world, way, 9, 4, 7)


@everywhere
def test_logits_equal_the_local_models(world: World) -> None:
    ids, _ = prompt(9, 9)
    torch.testing.assert_close(world.model(ids).logits, world.local(ids).logits, atol=1e-5, rtol=1e-5)


@everywhere
def test_a_hand_written_loop_equals_the_local_models(world: World) -> None:
    name = cache_argument(type(world.local))

    def loop(model: Any) -> list[int]:
        out = model(prompt(9)[0], use_cache=True)
        tokens = []
        for _ in range(8):
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token.item())
            out = model(token, **{name: out[name]})
        return tokens

    assert loop(world.model) == loop(world.local)


@everywhere
def test_the_models_under_test_do_not_repeat_one_token(world: World) -> None:
    assert len(set(answer(world.local, prompt(9)[0])[0, 9:].tolist())) > 4


# sessions


@over_hivemind
def test_a_second_generate_computes_only_what_is_new(world: World) -> None:
    ids, _ = prompt(6)
    with world.model.session(max_length=61) as session:
        first = answer(world.model, ids, new_tokens=5)
        more = torch.cat([first, prompt(3, seed=8)[0]], dim=1)
        steps = world.steps_from_now()
        second = answer(world.model, more, new_tokens=4)
        # The cache holds the prompt and all new tokens but the last, whose output nobody asked for.
        assert [(step.position, step.tokens) for step in steps] == [(10, 4), (14, 1), (15, 1), (16, 1)]
        assert [len(step.hops) for step in steps] == [3] * 4
        assert world.caches(session) == [(1, 17)] * 3
    assert_same(second, answer(world.local, more, new_tokens=4))


@over_hivemind
def test_a_prompt_that_departs_in_the_middle_rolls_the_session_back(world: World) -> None:
    ids, _ = prompt(6)
    with world.model.session() as session:
        first = answer(world.model, ids, new_tokens=8)
        other = first[:, :12].clone()
        other[0, 9] = (other[0, 9] + 1) % VOCABULARY
        steps = world.steps_from_now()
        second = answer(world.model, other, new_tokens=4)
        assert (steps[0].position, steps[0].tokens) == (9, 3)
        assert session.position == 15
    assert_same(second, answer(world.local, other, new_tokens=4))


@over_hivemind
def test_the_same_prompt_again_computes_one_token_of_it(world: World) -> None:
    ids, _ = prompt(6)
    with world.model.session():
        first = answer(world.model, ids)
        steps = world.steps_from_now()
        assert_same(answer(world.model, ids), first)
        assert (steps[0].position, steps[0].tokens) == (5, 1)


@over_hivemind
def test_beams_in_a_session_and_another_generate_after_them(world: World) -> None:
    ids, _ = prompt(6)
    with world.model.session():
        beams = answer(world.model, ids, num_beams=3)
        more = torch.cat([beams, prompt(2, seed=8)[0]], dim=1)
        second = answer(world.model, more)
    assert_same(beams, answer(world.local, ids, num_beams=3))
    assert_same(second, answer(world.local, more))


@over_hivemind
@pytest.mark.parametrize("way", ["beams", "several answers"])
def test_several_rows_go_on_from_the_one_that_a_session_holds(world: World, way: str) -> None:
    ids, _ = prompt(6)
    with world.model.session():
        more = torch.cat([answer(world.model, ids, new_tokens=4), prompt(2, seed=8)[0]], dim=1)
        steps = world.steps_from_now()
        second = answer(world.model, more, **WAYS[way])
        assert steps[0].position == 9
    assert_same(second, answer(world.local, more, **WAYS[way]))


@over_hivemind
@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_a_session_goes_on_after_draft_tokens_were_taken_back(world: World, way: dict[str, Any]) -> None:
    options = {"assistant_model": world.draft} if way.pop("assistant", False) else way
    ids, _ = prompt(9)
    with world.model.session():
        first = answer(world.model, ids, **options)
        more = torch.cat([first, prompt(2, seed=8)[0]], dim=1)
        steps = world.steps_from_now()
        second = answer(world.model, more)
        assert steps[0].position >= 19
    assert_same(second, answer(world.local, more))


@over_hivemind
def test_a_padded_batch_goes_on_in_a_session(world: World) -> None:
    ids, mask = prompt(9, 4, 7)
    with world.model.session():
        more = answer(world.model, ids, mask, new_tokens=4)
        longer = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], dim=1)
        steps = world.steps_from_now()
        second = answer(world.model, more, longer)
        assert steps[0].position == 12
    assert_same(second, answer(world.local, more, longer))


@over_hivemind
def test_the_same_ids_under_another_mask_are_computed_anew(world: World) -> None:
    ids, mask = prompt(9, 9)
    other = mask.clone()
    other[1, :3] = 0
    with world.model.session():
        answer(world.model, ids, mask)
        steps = world.steps_from_now()
        second = answer(world.model, ids, other)
        assert steps[0].position == 0
    assert_same(second, answer(world.local, ids, other))


@over_hivemind
def test_a_crop_reaches_the_servers(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, tokens, 32, generator=generator) for tokens in (10, 3))
    with world.model.session(max_length=62) as session, world.model.session() as fresh:
        session.step(old)
        session.crop(6)
        output = session.step(new)
        assert world.caches(session) == [(2, 9)] * 3
        wanted = fresh.step(torch.cat([old[:, :6], new], dim=1))[:, 6:]
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


@over_hivemind
@pytest.mark.parametrize("orders", [[[1, 1, 0]], [[1]], [[1, 0, 1], [2, 0]]])
def test_a_reordering_reaches_the_servers(world: World, orders: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2, 10, 32, generator=generator)
    rows = old
    with world.model.session(max_length=63) as session, world.model.session() as fresh:
        session.step(old)
        for order in orders:
            session.reorder(order)
            rows = rows[order]
        new = torch.randn(rows.shape[0], 3, 32, generator=generator)
        output = session.step(new)
        assert world.caches(session) == [(rows.shape[0], 13)] * 3
        wanted = fresh.step(torch.cat([rows, new], dim=1))[:, 10:]
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


@over_hivemind
def test_sessions_are_freed_on_the_servers_when_closed_or_forgotten(world: World) -> None:
    closed, forgotten = world.model.session(max_length=64), world.model.session(max_length=64)
    for session in (closed, forgotten):
        session.step(torch.zeros(1, 4, 32))
    assert len(world.caches(closed)) == 6
    closed.close()
    del forgotten, session
    gc.collect()
    wait_until(lambda: not world.caches(closed), "the servers freed both sessions")


@over_memory
def test_a_session_cannot_hold_more_than_its_length(world: World) -> None:
    with world.model.session(max_length=8) as session:
        with pytest.raises(SessionError, match="max_length of 8"):
            session.step(torch.zeros(1, 9, 32))
        with pytest.raises(SessionError, match="larger max_length"):
            answer(world.model, prompt(9)[0], new_tokens=5)
        session.crop(0)
        assert session.step(torch.zeros(1, 8, 32)).shape == (1, 8, 32)


@over_memory
def test_a_closed_session_says_so(world: World) -> None:
    with world.model.session() as session:
        pass
    session.close()
    assert session.closed
    with pytest.raises(SessionError, match="closed"):
        session.step(torch.zeros(1, 1, 32))
    with pytest.raises(SessionError, match="closed"):
        session.__enter__()
    with pytest.raises(SessionError, match="closed"):
        answer(world.model, prompt(6)[0], session=session)


@over_memory
def test_a_session_that_is_closed_in_the_middle_of_a_step_opens_nothing_anew(world: World) -> None:
    session = world.model.session(max_length=66)
    session.step(torch.zeros(1, 1, 32))
    middle = world.swarm.servers[1].peer_id
    network = world.swarm.network
    assert network is not None
    with ThreadPoolExecutor() as pool, portal.lease() as lease:
        _on_loop(lease, lambda: network.hang(middle))
        step = pool.submit(session.step, torch.zeros(1, 1, 32))
        wait_until(lambda: world.caches(session)[0] == (1, 2), "the first server has computed")
        session.close()
        with pytest.raises(SessionError, match="closed"):
            step.result()
        _on_loop(lease, lambda: network.resume(middle))
    wait_until(lambda: not world.caches(session), "the servers freed the session")


@over_memory
def test_gradients_of_a_session_are_refused(world: World) -> None:
    embeddings = torch.randn(1, 4, 32, requires_grad=True)
    with world.model.session() as session, pytest.raises(UsageError, match="gradients do not come out of a"):
        world.model(inputs_embeds=embeddings, past_key_values=SwarmCache(session))


@over_memory
def test_the_cache_of_a_local_model_is_refused(world: World) -> None:
    ids, _ = prompt(6)
    name = cache_argument(type(world.local))
    cache = world.local(ids, use_cache=True)[name]
    with pytest.raises(UsageError, match="not computed by the servers"):
        world.model(ids[:, :1], **{name: cache})


@over_memory
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_generate_takes_a_cache_by_its_old_and_its_new_name(world: World, name: str) -> None:
    ids, _ = prompt(6)
    session = world.model.session()
    tokens = answer(world.model, ids, new_tokens=5, **{name: SwarmCache(session)})
    assert session.position == 10
    assert_same(tokens, answer(world.local, ids, new_tokens=5))
    session.close()


@over_memory
def test_a_session_needs_token_ids_and_no_other_cache(world: World) -> None:
    ids, _ = prompt(6)
    with world.model.session():
        with pytest.raises(UsageError, match="either"):
            answer(world.model, ids, past_key_values=DynamicCache())
        with pytest.raises(UsageError, match="token ids"):
            world.model.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=2)


# use


@over_hivemind
def test_text_is_streamed_as_it_comes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    ids, _ = prompt(6)
    tokens = answer(world.model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(tokens[0, 6:]).split()
    assert_same(tokens, answer(world.local, ids))


@over_hivemind
def test_threads_generate_at_the_same_time_each_in_its_session(world: World) -> None:
    prompts = [prompt(5 + number, seed=number)[0] for number in range(4)]
    both_run = threading.Barrier(4, timeout=60)

    def talk(ids: Tensor) -> Tensor:
        with world.model.session():
            tokens = answer(world.model, ids, logits_processor=at({2: both_run.wait}))
            return answer(world.model, tokens)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(talk, prompts))
    for ids, tokens in zip(prompts, found, strict=True):
        assert_same(tokens, answer(world.local, answer(world.local, ids)))


@over_hivemind
def test_ctrl_c_between_two_tokens_leaves_the_model_usable(world: World) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    ids, _ = prompt(6)
    with world.model.session():
        with pytest.raises(KeyboardInterrupt):
            answer(world.model, ids, logits_processor=at({3: interrupt}))
        assert_same(answer(world.model, ids), answer(world.local, ids))
    assert_same(answer(world.model, ids), answer(world.local, ids))


@over_memory
def test_ctrl_c_within_a_step_leaves_the_session_usable(world: World) -> None:
    ids, _ = prompt(6)
    network, middle = world.swarm.network, world.swarm.servers[1].peer_id
    assert network is not None
    main = threading.main_thread().ident
    assert main is not None
    with portal.lease() as lease, world.model.session(max_length=65) as session:

        def hang_and_interrupt() -> None:
            _on_loop(lease, lambda: network.hang(middle))

            def press() -> None:
                wait_until(lambda: world.caches(session)[0] == (1, 10), "the first server has computed")
                signal.pthread_kill(main, signal.SIGINT)

            threading.Thread(target=press).start()

        try:
            with pytest.raises(KeyboardInterrupt):
                answer(world.model, ids, logits_processor=at({3: hang_and_interrupt}))
        finally:
            _on_loop(lease, lambda: network.resume(middle))
        assert session.position == 9
        output = session.step(torch.zeros(1, 1, 32))
        with world.model.session() as fresh:
            tokens = answer(world.local, ids, new_tokens=3)
            hidden = world.model.get_input_embeddings()(tokens)
            wanted = fresh.step(torch.cat([hidden, torch.zeros(1, 1, 32)], dim=1))[:, -1:]
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
        assert_same(answer(world.model, ids), answer(world.local, ids))


@over_memory
def test_a_follower_of_events_that_fails_does_not_change_an_answer(world: World) -> None:
    def fail(event: object) -> None:
        raise ValueError(event)

    ids, _ = prompt(6)
    with world.swarm.model() as model, following(model.connection.client.events, fail):
        assert_same(answer(model, ids), answer(world.local, ids))


# ends


@over_memory
@pytest.mark.parametrize("on_the_loop", [False, True])
def test_a_forgotten_model_leaves_the_swarm_without_blocking(world: World, on_the_loop: bool) -> None:
    network = world.swarm.network
    assert network is not None
    model = world.swarm.model()
    answer(model, prompt(4)[0], new_tokens=2)
    peer_id, held, alive = model.connection.client.peer_id, [model], weakref.ref(model)
    assert peer_id in network.peers
    del model

    async def forget() -> None:
        held.clear()
        gc.collect()

    with portal.lease() as lease:
        if on_the_loop:
            lease.call(forget)  # an end that waited for the loop would wait for itself here
        else:
            held.clear()
            gc.collect()
    assert alive() is None
    wait_until(lambda: peer_id not in network.peers, "the client left")
    assert_same(answer(world.model, prompt(6)[0]), answer(world.local, prompt(6)[0]))


@over_memory
def test_a_model_that_is_closed_while_it_is_used_says_so(world: World) -> None:
    model = world.swarm.model()
    network, middle = world.swarm.network, world.swarm.servers[1].peer_id
    assert network is not None
    with ThreadPoolExecutor() as pool, portal.lease() as lease:
        session = model.session(max_length=67)
        session.step(torch.zeros(1, 1, 32))
        _on_loop(lease, lambda: network.hang(middle))
        step = pool.submit(session.step, torch.zeros(1, 1, 32))
        wait_until(lambda: world.caches(session)[0] == (1, 2), "the first server has computed")
        model.close()
        with pytest.raises(UsageError, match="closed"):
            step.result()
        _on_loop(lease, lambda: network.resume(middle))
    with pytest.raises(UsageError, match="closed"):
        answer(model, prompt(4)[0])


def _on_loop(lease: portal.PortalLease, function: Any) -> None:
    async def call() -> None:
        function()

    lease.call(call)
