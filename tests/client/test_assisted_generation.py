"""Draft tokens change how fast an answer comes, but no greedy tokens, and not what sampled ones follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from swarmkit.bench.draft import load_first_blocks
from swarmkit.client.answer_thread import StopSignal
from swarmkit.client.speculation.assistants import SpeculationCount, Speculator, choose_way, match_length
from swarmkit.errors import UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

from ..models.tiny import make_checkpoint
from .answers import prompt
from .recovery import STAGES, World, a_world, assert_same

NEW_TOKENS = 40


class Beat:
    """A clock on which every step takes a second, and finding draft tokens no time at all.

    It is read when draft tokens are looked for, when they are found, and when the step is done.
    """

    def __init__(self) -> None:
        self._looks = 0
        self._now = 0.0

    def __call__(self) -> float:
        self._looks += 1
        if self._looks % 3 == 0:
            self._now += 1.0
        return self._now


class Watch:
    """A streamer that calls each action once, when so many tokens have come."""

    takes_several = True

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self._actions = dict(actions)
        self._came = -1

    def put(self, value: Tensor) -> None:
        self._came = 0 if self._came < 0 else self._came + value.numel()
        for tokens in [tokens for tokens in self._actions if tokens <= self._came]:
            self._actions.pop(tokens)()

    def end(self) -> None:
        assert not self._actions


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """An answer of `NEW_TOKENS`, in which a random model is free to repeat itself."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokens


@pytest.fixture(scope="module")
def local(tiny_llama: Checkpoint) -> PreTrainedModel:
    return load_local(tiny_llama)


@pytest.fixture(scope="module")
def draft(tiny_llama: Checkpoint) -> PreTrainedModel:
    """A model that agrees with the tiny Llama now and then: its first blocks."""
    return load_first_blocks(tiny_llama, 4)


@pytest.fixture(scope="module")
def swarm(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama) as world:
        yield world


@pytest.fixture
def world(swarm: World) -> World:
    """A swarm whose client knows nothing of draft tokens yet."""
    swarm.model.speculator = Speculator(Beat())
    return swarm


# greedy


@pytest.mark.parametrize("seed", [3, 4])
def test_greedy_tokens_are_the_local_ones_without_asking_for_it(
    world: World, local: PreTrainedModel, seed: int
) -> None:
    ids, _ = prompt(9, seed=seed)
    assert_same(greedy(world.model, ids), greedy(local, ids))
    count = world.model.speculation
    assert 0 < count.accepted < count.drafted


def test_steps_are_fewer_than_tokens(world: World) -> None:
    world.client.trace.clear()
    greedy(world.model, prompt(9)[0])
    assert len(world.client.trace) == NEW_TOKENS - world.model.speculation.accepted


def test_greedy_tokens_with_a_draft_are_the_local_ones(
    world: World, local: PreTrainedModel, draft: PreTrainedModel
) -> None:
    ids, _ = prompt(9)
    for _ in range(2):
        assert_same(greedy(world.model, ids, assistant_model=draft), greedy(local, ids))
    assert world.model.speculation.drafted > 0


def test_a_draft_that_is_the_model_itself_is_always_right_also_after_steps_without_it(
    world: World, local: PreTrainedModel
) -> None:
    ids, _ = prompt(9)
    assert_same(greedy(world.model, ids, assistant_model=local), greedy(local, ids))
    count = world.model.speculation
    assert count.accepted == count.drafted > 8


def test_a_draft_that_was_wrong_goes_on_from_the_true_text(
    world: World, local: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Steps without draft tokens come between: the draft must forget what it had drafted before them."""
    ids, _ = prompt(9)
    found: list[tuple[list[int], list[int]]] = []
    adapt = world.model.speculator.adapt

    def adapted(*args: Any) -> Any:
        drafts: Any = adapt(*args)
        windows = iter([1, 4, 0, 0, 3, 0, 5, 0, 0, 0, 6] + [0] * NEW_TOKENS)
        drafts.windows.choose = lambda kind, available: min(next(windows), available)
        get = drafts.get_candidates

        def noted(input_ids: Tensor) -> Any:
            candidates, scores = get(input_ids)
            if drafted := candidates.shape[1] - input_ids.shape[1]:
                alone = draft.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    do_sample=False,
                    max_new_tokens=drafted,
                    min_new_tokens=drafted,
                )
                found.append((candidates[0].tolist(), alone[0].tolist()))
            return candidates, scores

        drafts.get_candidates = noted
        return drafts

    world.model.speculator.adapt = adapted  # type: ignore[method-assign]
    assert_same(greedy(world.model, ids, assistant_model=draft), greedy(local, ids))
    assert len(found) == 5
    assert all(drafted == alone for drafted, alone in found)


@pytest.mark.parametrize("source", ["lookups", "draft"])
def test_a_server_that_is_killed_between_draft_tokens_changes_nothing(
    world: World, local: PreTrainedModel, draft: PreTrainedModel, source: str
) -> None:
    world.add(STAGES[1])
    ids, _ = prompt(9)
    options = {"assistant_model": draft} if source == "draft" else {}
    lost = len(world.lost())
    watch = Watch({20: lambda: world.in_use(1).kill()})
    assert_same(greedy(world.model, ids, streamer=watch, **options), greedy(local, ids))
    assert len(world.lost()) == lost + 1
    assert world.model.speculation.drafted > 0


@pytest.mark.parametrize("source", ["lookups", "draft"])
def test_a_session_goes_on_after_draft_tokens_and_with_them(
    world: World, local: PreTrainedModel, draft: PreTrainedModel, source: str
) -> None:
    ids, _ = prompt(9)
    options = {"assistant_model": draft} if source == "draft" else {}
    with world.model.session():
        more = torch.cat([greedy(world.model, ids, **options), prompt(3, seed=8)[0]], dim=1)
        world.client.trace.clear()
        assert_same(greedy(world.model, more, **options), greedy(local, more))
        assert world.client.trace[0].position > len(ids[0])  # what the session holds is not computed again
    assert world.model.speculation.drafted > 0


def test_draft_tokens_stay_within_what_a_session_may_hold(world: World, local: PreTrainedModel) -> None:
    ids, _ = prompt(9)
    with world.model.session(max_length=9 + NEW_TOKENS - 1):
        assert_same(greedy(world.model, ids), greedy(local, ids))
    assert world.model.speculation.accepted > 0


def test_the_number_that_a_user_names_is_the_most_that_are_drafted(world: World) -> None:
    world.client.trace.clear()
    greedy(world.model, prompt(9)[0], prompt_lookup_num_tokens=2)
    assert max(step.tokens for step in list(world.client.trace)[1:]) == 3


def test_switched_off_every_token_has_its_step(world: World) -> None:
    world.client.trace.clear()
    greedy(world.model, prompt(9)[0], speculation="off")
    assert len(world.client.trace) == NEW_TOKENS
    assert world.model.speculation == SpeculationCount()


# sampling


@pytest.fixture(scope="module")
def bigrams(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models of four tokens, whose next one depends on nothing but the last one."""

    def model(seed: int) -> PreTrainedModel:
        folder = make_checkpoint(
            tmp_path_factory.mktemp("bigrams"),
            "llama",
            1,
            seed=seed,
            vocab_size=4,
            max_position_embeddings=4096,
        )
        found = load_local(Checkpoint.open(folder))
        for name, parameter in found.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        found.generation_config = GenerationConfig(pad_token_id=0)
        return found

    return model(0), model(1)


@pytest.mark.parametrize("source", ["lookups", "draft"])
def test_what_is_sampled_is_distributed_as_without_draft_tokens(
    bigrams: tuple[PreTrainedModel, PreTrainedModel], source: str
) -> None:
    """Pearson's test, on the tokens that follow each token in a long answer."""
    model, other = bigrams
    speculator, plain = Speculator(Beat()), type(model)

    class Adaptive(plain):  # type: ignore[misc, valid-type]
        def _get_candidate_generator(self, **kwargs: Any) -> Any:
            inner = super()._get_candidate_generator(**kwargs)
            return speculator.adapt(inner, None, kwargs["generation_config"].max_length)

    way = {"assistant_model": other} if source == "draft" else {"prompt_lookup_num_tokens": 4}
    torch.manual_seed(0)
    model.__class__ = Adaptive
    try:
        text = model.generate(
            torch.tensor([[1, 2, 3]]), do_sample=True, temperature=1.2, top_k=0, max_new_tokens=900, **way
        )[0]
    finally:
        model.__class__ = plain
    assert speculator.count.accepted > 100
    assert speculator.count.drafted - speculator.count.accepted > 100

    expected = (model(torch.arange(4)[None], use_cache=False).logits[0] / 1.2).softmax(dim=-1)
    seen = torch.zeros(4, 4)
    for before, token in zip(text[2:-1].tolist(), text[3:].tolist(), strict=True):
        seen[before, token] += 1
    wanted = expected * seen.sum(dim=1, keepdim=True)
    statistic = ((seen - wanted) ** 2 / wanted).sum().item()
    freedom = 4 * 3
    assert wanted.min() > 5  # else the statistic is not distributed as it should be
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_sampling_is_left_alone_unless_asked_for(world: World) -> None:
    greedy(world.model, prompt(9)[0], do_sample=True)
    assert world.model.speculation == SpeculationCount()
    greedy(world.model, prompt(9)[0], do_sample=True, temperature=0.2, speculation="prompt-lookup")
    assert world.model.speculation.drafted > 0


# what does not go together


def _asked(way: str | None, usual: str = "auto", rows: int | None = 1, **options: Any) -> bool:
    """Whether draft tokens are looked up."""
    config = options.get("generation_config")

    def configured(name: str) -> Any:
        given = options.get(name)
        return given if given is not None else getattr(config, name, None)

    found = choose_way(way, usual, options, configured, rows)  # type: ignore[arg-type]
    given = found.get("generation_config")
    return "prompt_lookup_num_tokens" in found or bool(given and given.prompt_lookup_num_tokens)


IMPOSSIBLE: list[dict[str, Any]] = [
    {"rows": 2},
    {"rows": None},
    {"num_beams": 3},
    {"num_return_sequences": 2},
    {"use_cache": False},
    {"past_key_values": object()},
]
OTHERWISE: list[dict[str, Any]] = [
    {"do_sample": True},
    {"logits_processor": [print]},
    {"stopping_criteria": [print]},
    {"prefix_allowed_tokens_fn": print},
    {"stop_strings": ["."]},
    {"streamer": SimpleNamespace(put=print, end=print)},
    {"generation_config": GenerationConfig(do_sample=True)},
]


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_what_cannot_be_is_an_error_only_where_a_call_asks_for_it(options: dict[str, Any]) -> None:
    assert not _asked(None, **options)
    assert not _asked(None, "prompt-lookup", **options)
    with pytest.raises(UsageError, match="does not work with"):
        _asked("prompt-lookup", **options)


@pytest.mark.parametrize("options", OTHERWISE)
def test_what_might_come_out_otherwise_is_drafted_only_where_asked_for(options: dict[str, Any]) -> None:
    assert not _asked(None, **options)
    assert _asked("prompt-lookup", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logits_processor": []},
        {"streamer": Watch({})},
        {"stopping_criteria": [StopSignal()]},
        {"generation_config": GenerationConfig()},
    ],
)
def test_greedy_answers_are_drafted(options: dict[str, Any]) -> None:
    assert _asked(None, **options)


def test_a_users_config_stays_as_it_is() -> None:
    config = GenerationConfig()
    assert _asked(None, generation_config=config)
    assert config.prompt_lookup_num_tokens is None


def test_text_streamers_take_several_tokens_at_once() -> None:
    assert _asked(None, streamer=TextStreamer(SimpleNamespace()))


@pytest.mark.parametrize(
    ("way", "options", "said"),
    [("always", {}, "none of"), ("prompt-lookup", {"assistant_model": object()}, "either")],
)
def test_wishes_that_make_no_sense_are_refused(way: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _asked(way, **options)


@pytest.mark.parametrize(
    ("text", "token", "length"),
    [
        ([1, 2, 3, 9, 2, 3], 9, 2),
        ([1, 2, 3, 9, 1, 2, 3], 9, 3),
        ([5, 6, 1, 2, 3, 9, 5, 6, 1, 2, 3], 9, 4),
        ([7, 3, 9, 8, 3], 9, 1),
        ([4, 4, 4], 4, 2),
    ],
)
def test_a_match_is_as_long_as_the_longest_one_before_the_draft_token(
    text: list[int], token: int, length: int
) -> None:
    assert match_length(torch.tensor(text), token) == length


def test_no_match_is_longer_than_what_is_told_apart(tmp_path: Path) -> None:
    assert match_length(torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]), 6) == 4
