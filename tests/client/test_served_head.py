"""`generate()` gives the same tokens when a server computes the output layer, and when it lies or dies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from swarmkit.client.head.times import HeadTimes
from swarmkit.client.route_report import explain_route
from swarmkit.events import LogitsServed
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.logits_messages import Logits
from swarmkit.node.server import Server
from swarmkit.server.head.service import HeadService
from swarmkit.settings import ServerSettings

from ..models.tiny import make_checkpoint
from .answers import answer as longer_answer
from .answers import prompt
from .recovery import World, a_world, assert_same

VOCABULARY = 400
OFFERED = ServerSettings().replace(offer_head=True)
REMOTE = {"head": "remote", "head_top": 24, "check_share": 0.0}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, ends with bans": {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 3},
    "default sampling": {"do_sample": True, "top_k": 20},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.3, "temperature": 0.2},
    "min-p": {"do_sample": True, "top_k": 0, "min_p": 0.5, "temperature": 0.5},
    "penalties": {"repetition_penalty": 1.4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
ALL_LOGITS: dict[str, dict[str, Any]] = {
    "sampling from all": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "typical": {"do_sample": True, "top_k": 0, "typical_p": 0.8},
}


def answer(model: Any, ids: Tensor, mask: Tensor | None = None, *, new_tokens: int = 6, **how: Any) -> Any:
    """A short seeded answer."""
    return longer_answer(model, ids, mask, new_tokens=new_tokens, **how)


def some(cases: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """All cases, of which only the quick ones belong to a quick run."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def model_of(folder: Path, model_type: str = "llama", **changes: Any) -> Checkpoint:
    return Checkpoint.open(
        make_checkpoint(folder, model_type, vocab_size=VOCABULARY, max_position_embeddings=512, **changes)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model_of(tmp_path_factory.mktemp("wide-llama"))


@pytest.fixture(scope="module")
def local(checkpoint: Checkpoint) -> Any:
    return load_local(checkpoint)


@pytest.fixture(scope="module")
def world(checkpoint: Checkpoint) -> Iterator[World]:
    """A server of all blocks that offers the output layer; its client has it computed there."""
    with a_world(checkpoint, replicas=1, stages=1, server_settings=OFFERED, **REMOTE) as world:
        answer(world.model, *prompt(7), new_tokens=2)  # the first token shows what the model does to logits
        yield world


def a_head(checkpoint: Checkpoint, **options: Any) -> Any:
    return a_world(checkpoint, replicas=1, stages=1, server_settings=OFFERED, **{**REMOTE, **options})


def served_since(world: World, act: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What an act returns, and how many logits of a row each of a server's answers had meanwhile."""
    kept = world.client.events.kept(LogitsServed)
    kept.clear()
    result = act()
    return result, [event.top for event in kept]


@pytest.mark.parametrize("way", some(WAYS, ("greedy", "default sampling", "top-p")))
def test_the_largest_logits_suffice_for_the_same_tokens(world: World, local: Any, way: str) -> None:
    wanted = answer(local, *prompt(7), **WAYS[way])
    found, tops = served_since(world, lambda: answer(world.model, *prompt(7), **WAYS[way]))
    assert_same(found, wanted)
    assert tops
    assert all(tops)


@pytest.mark.parametrize("way", some(ALL_LOGITS, ["beams"]))
def test_all_logits_come_where_they_are_needed(world: World, local: Any, way: str) -> None:
    wanted = answer(local, *prompt(7), **ALL_LOGITS[way])
    found, tops = served_since(world, lambda: answer(world.model, *prompt(7), **ALL_LOGITS[way]))
    assert_same(found, wanted)
    assert set(tops) == {0}


@pytest.mark.slow
def test_where_the_largest_logits_do_not_suffice_all_of_them_come(world: World, local: Any) -> None:
    how = {"do_sample": True, "top_k": 0, "top_p": 0.97}
    wanted = answer(local, *prompt(7), **how)
    found, tops = served_since(world, lambda: answer(world.model, *prompt(7), **how))
    assert_same(found, wanted)
    assert set(tops) == {24, 0}
    assert tops.count(24) < tops.count(0)  # after some tokens it asks for all of them at once


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampling"])
def test_padded_rows_of_a_batch_have_the_same_tokens(world: World, local: Any, how: dict[str, Any]) -> None:
    ids, mask = prompt(7, 3, 5)
    assert_same(answer(world.model, ids, mask, **how), answer(local, ids, mask, **how))


@pytest.mark.slow
def test_scores_that_are_asked_for_are_complete(world: World, local: Any) -> None:
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, wanted = (answer(model, *prompt(7), new_tokens=3, **how) for model in (world.model, local))
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(found[name]), torch.cat(wanted[name]), atol=1e-5, rtol=1e-4)


def test_a_loss_needs_no_server(world: World, local: Any) -> None:
    ids, _ = prompt(7)
    loss, tops = served_since(world, lambda: world.model(ids, labels=ids).loss)
    torch.testing.assert_close(loss, local(ids, labels=ids).loss)
    assert tops == []


@pytest.mark.slow
def test_two_threads_have_their_own_answers(world: World, local: Any) -> None:
    texts = [prompt(7, seed=seed) for seed in (1, 2)]
    wanted = [answer(local, *text) for text in texts]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda text: answer(world.model, *text), texts))
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]


@pytest.mark.slow
def test_a_draft_model_may_draft(world: World, local: Any) -> None:
    how = {"assistant_model": local}
    assert_same(answer(world.model, *prompt(7), **how), answer(local, *prompt(7)))


@pytest.mark.slow
def test_a_draft_model_of_a_swarm_computes_its_own_output_layer(world: World, local: Any) -> None:
    draft = world.swarm.model(settings=world.client.settings.replace(head="local"))
    found, tops = served_since(world, lambda: answer(world.model, *prompt(7), assistant_model=draft))
    assert_same(found, answer(local, *prompt(7)))
    assert tops
    assert not draft.connection.client.events.kept(LogitsServed)


@pytest.mark.slow
def test_logits_that_the_model_changes_come_completely(tmp_path: Path) -> None:
    checkpoint = model_of(tmp_path, "gemma2")  # which caps its logits
    wanted = answer(load_local(checkpoint), *prompt(7), do_sample=True, top_k=5)
    with a_head(checkpoint) as world:
        found, tops = served_since(world, lambda: answer(world.model, *prompt(7), do_sample=True, top_k=5))
    assert_same(found, wanted)
    assert set(tops) == {0}


@pytest.mark.slow
def test_a_client_in_bfloat16_has_the_same_tokens_with_a_server(checkpoint: Checkpoint) -> None:
    with a_head(checkpoint) as world:
        served = world.swarm.model(dtype="bfloat16", settings=world.client.settings)
        alone = world.swarm.model(dtype="bfloat16", settings=world.client.settings.replace(head="local"))
        for how in ({}, {"do_sample": True, "top_k": 5}):
            assert_same(answer(served, *prompt(7), **how), answer(alone, *prompt(7), **how))
        assert served.connection.client.events.kept(LogitsServed)


# where it is computed


def test_the_report_of_a_route_names_the_servers_that_offer_it(world: World) -> None:
    ((label, seconds),) = explain_route(world.model, alone=False).heads
    assert label == "server-0"
    assert seconds > 0


@pytest.mark.parametrize(
    ("settings", "offered"),
    [({"head": "local"}, OFFERED), ({"head": "remote"}, ServerSettings())],
    ids=["the user wants none", "nobody offers it"],
)
def test_it_is_computed_here(checkpoint: Checkpoint, settings: dict[str, Any], offered: Any) -> None:
    with a_world(checkpoint, replicas=1, stages=1, server_settings=offered, **settings) as world:
        assert served_since(world, lambda: answer(world.model, *prompt(7)))[1] == []
        assert "forward" not in vars(world.model.get_output_embeddings())


@pytest.mark.slow
def test_weights_of_the_users_own_are_used_here(checkpoint: Checkpoint) -> None:
    with a_head(checkpoint) as world, torch.no_grad():
        world.model.get_output_embeddings().weight.mul_(2.0)
        assert served_since(world, lambda: answer(world.model, *prompt(7)))[1] == []


@pytest.mark.parametrize(
    ("local_s", "is_asked"),
    [(5.0, True), pytest.param(1e-9, False, marks=pytest.mark.slow)],
    ids=["slow", "quick"],
)
def test_by_default_a_server_is_asked_where_this_machine_was_measured_to_be_slower(
    checkpoint: Checkpoint, local: Any, local_s: float, is_asked: bool
) -> None:
    with a_head(checkpoint, head="auto") as world:
        client = world.client
        for _ in range(2):
            world.model.served_head.times.note("local", 1, local_s, client.clock.now())
        found, tops = served_since(world, lambda: answer(world.model, *prompt(7)))
    assert_same(found, answer(local, *prompt(7)))
    assert bool(tops) is is_asked


NOW = 100.0


def times(**seconds: float) -> HeadTimes:
    found = HeadTimes()
    for way, each in seconds.items():
        for _ in range(2):
            found.note(way, 1, each, NOW)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("known", "claimed_s", "expected"),
    [
        (HeadTimes(), 0.001, False),
        (times(local=0.2), 0.03, True),
        (times(local=0.02), 0.03, False),
        (times(local=0.2, top=0.3), 0.03, False),
        (times(local=0.2, top=0.1), 0.5, True),
    ],
    ids=["measured here first", "a claim is tried", "a slow claim is not", "slow as seen", "quick as seen"],
)
def test_the_quicker_way_is_taken(known: HeadTimes, claimed_s: float, expected: bool) -> None:
    assert known.is_quicker("top", 1, claimed_s, NOW) is expected


def test_the_slower_way_is_measured_again_after_a_while() -> None:
    known = times(local=0.2, top=0.3)
    assert [known.is_quicker("top", 1, 0.0, NOW + after) for after in (1, 31, 32)] == [False, True, False]


def test_a_server_that_did_not_answer_is_left_alone_for_a_while() -> None:
    known = times(local=0.2, top=0.1)
    known.note_failure("top", 1, 5.0, NOW)
    assert not known.is_quicker("top", 1, 0.0, NOW)


# servers that fail, and servers that lie


def head_of(world: World) -> HeadService:
    """What the world's only server computes logits with."""
    (server,) = world.swarm.servers
    assert isinstance(server, Server)
    assert server.serving is not None
    assert server.serving.head is not None
    return server.serving.head


def bend(world: World, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Have the server change the tensors of its answers before it sends them."""
    head = head_of(world)
    honest = head.reply

    async def bent(request: Any) -> tuple[Logits, list[memoryview]]:
        reply, _ = await honest(request)
        result = request.result
        parts = {"values": result.values, "log_sum_exp": result.log_sum_exp, "tokens": result.tokens}
        parts = {name: part.clone() for name, part in parts.items() if part is not None}
        change(parts)
        coded = {name: codec.encode(part) for name, part in parts.items()}
        specs = {name: spec for name, (spec, _) in coded.items()}
        return msgspec.structs.replace(reply, **specs), [data for _, data in coded.values()]

    head.reply = bent  # type: ignore[method-assign]


def set_to(name: str, value: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda parts: parts[name].fill_(value)


MALFORMED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "not finite": set_to("values", float("nan")),
    "an infinite sum": set_to("log_sum_exp", float("inf")),
    "a sum that is too small": set_to("log_sum_exp", -1e4),
    "a sum that is too large": set_to("log_sum_exp", 1e4),
    "a token twice": set_to("tokens", 3),
    "no token": set_to("tokens", VOCABULARY),
    "a negative token": set_to("tokens", -1),
    "in another order": lambda parts: parts["values"].copy_(parts["values"].flip(1)),
    "too few": lambda parts: parts.update(values=parts["values"][:, :-1].contiguous()),
    "in another dtype": lambda parts: parts.update(values=parts["values"].half()),
    "without tokens": lambda parts: parts.pop("tokens"),
}


@pytest.mark.parametrize("how", some(MALFORMED, ["a token twice"]))
def test_a_malformed_answer_is_not_used(checkpoint: Checkpoint, local: Any, how: str) -> None:
    with a_head(checkpoint) as world:
        bend(world, MALFORMED[how])
        found, tops = served_since(world, lambda: answer(world.model, *prompt(7)))
    assert_same(found, answer(local, *prompt(7)))
    assert tops == []


@pytest.mark.parametrize("how", [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)])
def test_wrong_logits_are_seen_at_once(checkpoint: Checkpoint, local: Any, how: dict[str, Any]) -> None:
    with a_head(checkpoint) as world:
        bend(world, lambda parts: [parts[name].add_(0.5) for name in ("values", "log_sum_exp")])
        found, tops = served_since(world, lambda: answer(world.model, *prompt(7), **how))
        assert world.client.bans.convicted
    assert len(tops) == 1  # it was not asked a second time
    assert_same(found, answer(local, *prompt(7), **how))


def test_a_token_that_is_left_out_is_missed_by_a_check(checkpoint: Checkpoint, local: Any) -> None:
    with a_head(checkpoint, check_share=1.0) as world:
        head = head_of(world)
        honest = head.layer

        class Hiding:
            """Computes the logits of all tokens but the likeliest, which it calls very unlikely."""

            vocabulary, hidden_size = honest.vocabulary, honest.hidden_size

            def __call__(self, hidden: Tensor) -> Tensor:
                logits = honest(hidden).clone()
                return logits.scatter(1, logits.argmax(dim=1, keepdim=True), -50.0)

        head.layer = Hiding()  # type: ignore[assignment]
        found = answer(world.model, *prompt(7))
        assert world.client.bans.convicted
    assert_same(found, answer(local, *prompt(7)))


def test_a_server_that_is_killed_in_an_answer_changes_no_token(checkpoint: Checkpoint, local: Any) -> None:
    how = {**REMOTE, "replicas": 2, "stages": 1, "server_settings": OFFERED}
    with a_world(checkpoint, **how) as world:
        kept = world.client.events.kept(LogitsServed)
        found = answer(
            world.model,
            *prompt(7),
            new_tokens=8,
            streamer=_AfterTokens(4, lambda: world.server(kept[-1].peer_id).kill()),
        )
        used = [event.peer_id for event in kept]
    assert_same(found, answer(local, *prompt(7), new_tokens=8))
    assert used[0] != used[-1]


class _AfterTokens:
    """A streamer that acts once, when so many tokens have come."""

    def __init__(self, tokens: int, action: Callable[[], object]) -> None:
        self._left = tokens + 1  # the prompt comes first
        self._action = action

    def put(self, value: Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()

    def end(self) -> None:
        """Nothing is held back."""
