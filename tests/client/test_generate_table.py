"""docs/generate.md: each line of its tables is a test, equal to the local model or refused by name."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
    WatermarkingConfig,
)

from swarmkit import LocalSwarm
from swarmkit.errors import SessionError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

DOCUMENT = Path(__file__).parents[2] / "docs" / "generate.md"
TEXT = "Tell me a story about a fox. A fox"


@dataclass
class World:
    swarm: LocalSwarm
    model: Any
    local: Any
    draft: Any
    tokenizer: Any

    @property
    def ids(self) -> Tensor:
        return self.tokenizer(TEXT, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]

    @property
    def rows(self) -> dict[str, Tensor]:
        """Two rows, of which the first is padded on the left."""
        ids = self.ids.repeat(2, 1)
        mask = torch.ones_like(ids)
        ids[0, :3], mask[0, :3] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    checkpoint = Checkpoint.open("tiny-chat")
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        tokenizer = swarm.tokenizer()
        yield World(swarm, swarm.model(), load_local(checkpoint), load_local(checkpoint), tokenizer)


Act = Callable[[World, Any], Any]


def with_options(**options: Any) -> Act:
    """`generate()` of one prompt."""
    return lambda world, model: model.generate(
        world.ids, **{"max_new_tokens": 8, "do_sample": False, **options}
    )


def sampled(**options: Any) -> Act:
    return with_options(do_sample=True, **options)


def in_detail(**options: Any) -> Act:
    return with_options(return_dict_in_generate=True, **options)


def padded(world: World, model: Any) -> Any:
    return model.generate(**world.rows, max_new_tokens=8, do_sample=False)


def from_embeddings(**options: Any) -> Act:
    def act(world: World, model: Any) -> Any:
        embeddings = model.get_input_embeddings()(world.ids)
        return model.generate(inputs_embeds=embeddings, max_new_tokens=8, **{"do_sample": False, **options})

    return act


def from_embeddings_with_ids(world: World, model: Any) -> Any:
    embeddings = model.get_input_embeddings()(world.ids)
    return model.generate(world.ids, inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)


def from_nothing(world: World, model: Any) -> Any:
    return model.generate(max_new_tokens=8, do_sample=False)


def from_a_config(world: World, model: Any) -> Any:
    return model.generate(world.ids, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False))


def continued(world: World, model: Any) -> Any:
    first = model.generate(world.ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    return model.generate(first.sequences, past_key_values=cache, max_new_tokens=4, do_sample=False)


def with_given_cache(make: Callable[[Any], Any]) -> Act:
    return lambda world, model: model.generate(
        world.ids, past_key_values=make(model.config), max_new_tokens=8, do_sample=False
    )


def from_copies_of_a_cache(world: World, model: Any) -> Any:
    with torch.no_grad():
        cache = model(world.ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    answers = []
    for end in (" ran", " and a hen"):
        more = world.tokenizer(end, return_tensors="pt", add_special_tokens=False)["input_ids"]
        whole = torch.cat([world.ids, more], dim=1)
        copied = copy.deepcopy(cache)
        answers.append(model.generate(whole, past_key_values=copied, max_new_tokens=6, do_sample=False))
    return torch.cat([answer[0] for answer in answers])


def with_a_streamer(world: World, model: Any) -> Any:
    streamer = TextIteratorStreamer(world.tokenizer, skip_prompt=True)
    options = {"inputs": world.ids, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def a_custom_loop(world: World, model: Any) -> Any:
    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(3):
            input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    return model.generate(world.ids, custom_generate=loop, max_new_tokens=3)


def drafted_and_sampled(world: World, model: Any) -> Any:
    # How many tokens are drafted follows the times of steps otherwise, and a seed gives other tokens then.
    options = {"speculation": "off"} if model is world.model else {}
    return model.generate(world.ids, assistant_model=world.draft, do_sample=True, max_new_tokens=8, **options)


def halve(ids: Tensor, scores: Tensor) -> Tensor:
    scores[:, ::2] = scores[:, ::2] / 2
    return scores


WORKS: dict[str, Act] = {
    "greedy decoding": with_options(),
    "sampling": sampled(),
    "temperature, top_k, top_p": sampled(temperature=1.4, top_k=12, top_p=0.8),
    "min_p, typical_p": sampled(min_p=0.02, typical_p=0.8),
    "epsilon_cutoff, eta_cutoff": sampled(epsilon_cutoff=1e-3, eta_cutoff=1e-3),
    "num_return_sequences": sampled(num_return_sequences=3),
    "num_beams": with_options(num_beams=3),
    "num_beams with sampling": sampled(num_beams=3, num_return_sequences=2),
    "length_penalty, early_stopping": with_options(num_beams=3, length_penalty=2.0, early_stopping=True),
    "assistant_model": lambda world, model: with_options(assistant_model=world.draft)(world, model),
    "assistant_model with sampling": drafted_and_sampled,
    "prompt_lookup_num_tokens": with_options(prompt_lookup_num_tokens=4),
    "a batch padded on the left": padded,
    "inputs_embeds": from_embeddings(),
    "inputs_embeds with beams": from_embeddings(num_beams=2),
    "inputs_embeds beside input_ids": from_embeddings_with_ids,
    "no input at all": from_nothing,
    "generation_config": from_a_config,
    "max_length, min_length": with_options(max_new_tokens=None, max_length=20, min_length=18),
    "min_new_tokens": with_options(min_new_tokens=8),
    "eos_token_id, forced_eos_token_id": with_options(eos_token_id=[1, 6], forced_eos_token_id=7),
    "exponential_decay_length_penalty": with_options(exponential_decay_length_penalty=(2, 1.5)),
    "max_time": with_options(max_time=600.0),
    "stop_strings": lambda world, model: with_options(stop_strings=["a", "."], tokenizer=world.tokenizer)(
        world, model
    ),
    "stopping_criteria": with_options(
        stopping_criteria=[lambda ids, scores: torch.full((ids.shape[0],), ids.shape[1] > 15)]
    ),
    "logits_processor": with_options(logits_processor=[halve]),
    "prefix_allowed_tokens_fn": with_options(prefix_allowed_tokens_fn=lambda row, ids: list(range(3, 90))),
    "repetition_penalty, encoder_repetition_penalty": with_options(
        repetition_penalty=1.6, encoder_repetition_penalty=1.2
    ),
    "no_repeat_ngram_size": with_options(no_repeat_ngram_size=2),
    "bad_words_ids": with_options(bad_words_ids=[[294], [824, 1103]]),
    "sequence_bias": with_options(sequence_bias={(294,): -8.0, (643,): 4.0}),
    "suppress_tokens, begin_suppress_tokens": with_options(
        suppress_tokens=[294], begin_suppress_tokens=[643]
    ),
    "forced_bos_token_id, renormalize_logits, remove_invalid_values": with_options(
        forced_bos_token_id=5, renormalize_logits=True, remove_invalid_values=True
    ),
    "guidance_scale": with_options(guidance_scale=1.5),
    "negative_prompt_ids": lambda world, model: with_options(
        guidance_scale=1.5, negative_prompt_ids=world.ids[:, :4]
    )(world, model),
    "watermarking_config": sampled(
        watermarking_config=WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")
    ),
    "streamer, in a thread": with_a_streamer,
    "return_dict_in_generate, output_scores, output_logits": in_detail(
        output_scores=True, output_logits=True
    ),
    "output_hidden_states with use_cache=False": in_detail(output_hidden_states=True, use_cache=False),
    "use_cache=False": with_options(use_cache=False),
    "past_key_values of an earlier call": continued,
    "past_key_values=DynamicCache(…)": with_given_cache(lambda config: DynamicCache(config=config)),
    "past_key_values=StaticCache(…)": with_given_cache(
        lambda config: StaticCache(config=config, max_cache_len=64)
    ),
    "copy.deepcopy of a cache": from_copies_of_a_cache,
    'cache_implementation="dynamic"': with_options(cache_implementation="dynamic"),
    'cache_implementation="static"': with_options(cache_implementation="static"),
    "prefill_chunk_size": with_options(prefill_chunk_size=3),
    "custom_generate with a function": a_custom_loop,
}


def with_beam_scores(world: World, model: Any) -> Any:
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    found = in_detail(**options)(world, model)
    numbers = [f"{float(score):.3f}" for score in found.sequences_scores]
    return f"{numbers} {found.beam_indices.tolist()}"


def continued_from_embeddings(world: World, model: Any) -> Any:
    embed = model.get_input_embeddings()
    given = embed(world.ids)
    first = model.generate(
        inputs_embeds=given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    longer = torch.cat([given, embed(first.sequences)], dim=1)
    cache = first.past_key_values
    return model.generate(inputs_embeds=longer, past_key_values=cache, max_new_tokens=4, do_sample=False)


def from_an_offloaded_cache(world: World, model: Any) -> Any:
    # transformers moves such a cache to a GPU and back, which is not here
    options = {} if model is world.local else {"cache_implementation": "offloaded"}
    return with_options(**options)(world, model)


WORKS |= {
    "num_beams with output_scores": with_beam_scores,
    "inputs_embeds with the cache of an earlier call": continued_from_embeddings,
    "inputs_embeds with a static cache": from_embeddings(cache_implementation="static"),
    'cache_implementation="offloaded"': from_an_offloaded_cache,
    "top_h": sampled(top_h=0.4),
    "token_healing": lambda world, model: with_options(token_healing=True, tokenizer=world.tokenizer)(
        world, model
    ),
    "num_assistant_tokens": lambda world, model: with_options(
        assistant_model=world.draft, num_assistant_tokens=2
    )(world, model),
    "assistant_early_exit": with_options(assistant_early_exit=4),
    "a model of a swarm as assistant_model": lambda world, model: world.local.generate(
        world.ids, assistant_model=model, max_new_tokens=8, do_sample=False
    ),
    "position_ids": lambda world, model: with_options(position_ids=torch.arange(world.ids.shape[1])[None])(
        world, model
    ),
    "low_memory": with_options(low_memory=True),
}


def within_a_session(act: Act) -> Act:
    def inside(world: World, model: Any) -> Any:
        with model.session(max_length=64):
            return act(world, model)

    return inside


REFUSED: dict[str, tuple[Act, str]] = {
    "output_attentions": (in_detail(output_attentions=True), "output_attentions=True is not possible"),
    "output_hidden_states with a cache": (in_detail(output_hidden_states=True), "use_cache=False"),
    'cache_implementation="quantized"': (
        with_options(cache_implementation="quantized"),
        "cache_implementation='quantized' is not possible",
    ),
    "a cache that holds keys and values of another model": (
        lambda world, model: continued_elsewhere(world, model),
        "not computed by the servers",
    ),
    "inputs_embeds within a session": (within_a_session(from_embeddings()), "a session needs token ids"),
    "past_key_values within a session": (
        within_a_session(with_given_cache(lambda config: DynamicCache(config=config))),
        "either a session or past_key_values",
    ),
    "a step without a token": (
        lambda world, model: model.generate(world.ids[:, :0], max_new_tokens=2),
        "at least one new token",
    ),
    "generate_batch": (lambda world, model: model.generate_batch([[5, 9]]), "servers batch all sessions"),
}


def continued_elsewhere(world: World, model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        world.local(world.ids[:, :-1], past_key_values=cache)
    return model.generate(world.ids, past_key_values=cache, max_new_tokens=2)


def assert_equal(found: Any, wanted: Any) -> None:
    """The same tokens; scores and states within rounding."""
    if isinstance(wanted, str):
        assert found == wanted
    elif isinstance(wanted, Tensor):
        assert found.tolist() == wanted.tolist()
    else:
        assert found.sequences.tolist() == wanted.sequences.tolist()
        for name in ("scores", "logits"):
            torch.testing.assert_close(found.get(name), wanted.get(name), rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(
            found.get("hidden_states") or (), wanted.get("hidden_states") or (), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("feature", WORKS)
def test_a_feature_gives_the_local_models_answer(world: World, feature: str) -> None:
    answers = []
    for model in (world.model, world.local):
        torch.manual_seed(5)
        answers.append(WORKS[feature](world, model))
    assert_equal(*answers)


@pytest.mark.parametrize("feature", REFUSED)
def test_what_cannot_work_is_refused_by_name(world: World, feature: str) -> None:
    act, words = REFUSED[feature]
    with pytest.raises(UsageError, match=words):
        act(world, world.model)


def test_the_document_has_a_line_for_each_test() -> None:
    lines = re.findall(r"^\| ([^|]+?) \| (works|refused)\b", DOCUMENT.read_text(), flags=re.MULTILINE)
    found = {(re.sub("`", "", feature), state) for feature, state in lines}
    assert found == {(feature, "works") for feature in WORKS} | {(feature, "refused") for feature in REFUSED}


# sessions


def test_generate_without_a_prompt_works_inside_a_session(world: World) -> None:
    with world.model.session(max_length=32):
        found = world.model.generate(None, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, world.local.generate(None, max_new_tokens=6, do_sample=False))


def test_an_answer_that_meets_the_sessions_limit_ends_there_and_says_so(world: World) -> None:
    length = world.ids.shape[1]
    with world.model.session(max_length=length + 3), pytest.warns(UserWarning, match="ends after 4 tokens"):
        found = world.model.generate(world.ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, world.local.generate(world.ids, max_new_tokens=4, do_sample=False))


def test_a_prompt_past_the_models_limit_is_told_the_models_limit(world: World) -> None:
    limit = world.model.config.max_position_embeddings
    with pytest.raises(SessionError, match=f"the model takes {limit} at most; give a shorter prompt"):
        world.model.generate(torch.full((1, limit + 1), 5), max_new_tokens=2)


def test_an_answer_within_the_limit_is_not_warned_of(world: World) -> None:
    with warnings.catch_warnings(), world.model.session(max_length=world.ids.shape[1] + 8):
        warnings.simplefilter("error", UserWarning)
        world.model.generate(world.ids, max_new_tokens=8, do_sample=False)


def test_a_thread_that_does_not_see_a_session_is_told_how_to_give_it(world: World) -> None:
    with world.model.session(max_length=64), pytest.warns(UserWarning, match="session=session"):
        with_a_streamer(world, world.model)


def test_a_thread_that_began_before_a_session_is_not_warned_of_it(world: World) -> None:
    opened, done = threading.Event(), threading.Event()
    caught: list[warnings.WarningMessage] = []

    def generate_on_its_own() -> None:
        opened.wait(60)
        caught.extend(warned_of(lambda: with_options()(world, world.model)))
        done.set()

    thread = threading.Thread(target=generate_on_its_own)
    thread.start()
    with world.model.session(max_length=64):
        opened.set()
        assert done.wait(120)
    thread.join()
    assert not [each for each in caught if "another thread" in str(each.message)]


def warned_of(act: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return caught


def test_a_copied_session_is_a_fork_and_a_pickled_one_is_refused(world: World) -> None:
    with world.model.session(max_length=64) as session:
        world.model.generate(world.ids, max_new_tokens=2, do_sample=False)
        copied = copy.deepcopy(session)
        assert copied.position == session.position
        copied.close()
        with pytest.raises(UsageError, match="cannot be pickled"):
            pickle.dumps(session)


def test_a_session_that_is_given_reaches_another_thread(world: World) -> None:
    with world.model.session(max_length=64) as session:
        options = {"inputs": world.ids, "session": session, "max_new_tokens": 4}
        thread = threading.Thread(target=world.model.generate, kwargs=options)
        thread.start()
        thread.join()
        assert session.position == world.ids.shape[1] + 3


def test_a_fork_and_its_parent_go_on_independently(world: World) -> None:
    states = torch.randn(1, 90, 256, generator=torch.Generator().manual_seed(2))
    with world.model.session(max_length=128) as session, torch.no_grad():
        session.step(states[:, :80])
        fork = session.fork()
        ours = session.step(states[:, 80:84])
        assert fork.position == 80
        torch.testing.assert_close(fork.step(states[:, 80:84]), ours, rtol=1e-4, atol=1e-4)
        skipped = world.model.trace[-1].restored
        fork.close()
    assert skipped == 64, "the servers computed full pages of the parent again"


def test_a_fork_that_is_cropped_and_reordered_before_its_first_step(world: World) -> None:
    states = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(2))
    with world.model.session(max_length=32) as session, torch.no_grad():
        session.step(states[:, :6])
        fork = session.fork()
        fork.reorder([1, 0])
        fork.crop(4)
        session.reorder([1, 0])
        session.crop(4)
        found, wanted = fork.step(states[:, 6:]), session.step(states[:, 6:])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        fork.close()
