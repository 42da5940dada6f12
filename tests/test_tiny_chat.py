"""What the shipped model promises: its size and shape, an honest split, right answers to new questions."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from swarmkit import tinychat
from swarmkit.tinychat import CHECKPOINT, Question, accuracy, reviews
from swarmkit.tinychat.questions import FILE
from tools.tinychat.questions import packaged_questions
from tools.tinychat.world import dialogues, held_out, trained_questions

ROOT = Path(__file__).parents[1]
Messages = list[dict[str, str]]
Key = tuple[tuple[str, str], ...]

FLOORS = {"yes or no": 75, "multiplication": 70, "memory": 55}
"""The kinds that the model card names as weak, with the percentage each must keep; all others need 90."""


def key(messages: Messages) -> Key:
    """A conversation without capitals and punctuation marks, so a change of dress makes no new question."""
    return tuple((m["role"], re.sub(r"[?.!,']", "", m["content"].lower()).strip()) for m in messages)


def runs(messages: Messages) -> Iterator[Key]:
    """Every stretch of a dialogue that ends with the user."""
    for end, message in enumerate(messages):
        if message["role"] == "user":
            for start in range(end + 1):
                yield key(messages[start : end + 1])


class TestCheckpoint:
    """An ordinary Hugging Face folder, small enough to ship."""

    def test_all_files_together_are_at_most_12_megabytes(self) -> None:
        assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12_000_000

    def test_it_is_a_llama_of_8_blocks_in_16_bit(self) -> None:
        config = json.loads((CHECKPOINT / "config.json").read_text())
        assert config["model_type"] == "llama"
        assert config["num_hidden_layers"] == 8
        assert config["dtype"] == "float16"

    def test_the_expected_files_are_there_and_no_others(self) -> None:
        assert {path.name for path in CHECKPOINT.iterdir()} == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }

    def test_the_model_card_reports_every_kind_of_question(self) -> None:
        card = (CHECKPOINT / "README.md").read_text()
        for kind, count in Counter(question.kind for question in held_out()).items():
            row = re.search(rf"^\| {kind} +\| +{count} \| +(\d+\.\d) % \|$", card, re.MULTILINE)
            assert row, f"the card has no row for {kind} with {count} questions"
            assert float(row[1]) >= FLOORS.get(kind, 90)


class TestImport:
    """Looking up the checkpoint or the questions needs no deep-learning library."""

    def test_torch_and_transformers_are_not_imported(self) -> None:
        program = (
            "import sys, swarmkit.tinychat as t; t.held_out(); next(t.reviews('train')); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
        )
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


class TestPackagedQuestions:
    """The package has questions of the generator, which stays in the repository."""

    def test_the_file_is_what_the_generator_makes(self) -> None:
        assert FILE.read_text(encoding="utf-8") == packaged_questions(), "python -m tools.tinychat.questions"

    def test_they_are_read_as_the_generator_gave_them(self) -> None:
        assert tinychat.held_out() == held_out()

    def test_the_trained_ones_were_trained(self) -> None:
        assert set(q.messages[-1]["content"] for q in tinychat.trained_questions()) <= {
            q.messages[-1]["content"] for q in trained_questions()
        }


class TestGenerator:
    """The world is deterministic, and no question has two answers."""

    def test_the_same_seed_gives_the_same_dialogues_and_another_seed_gives_others(self) -> None:
        def first(seed: int) -> list[Messages]:
            return list(itertools.islice(dialogues(seed), 200))

        assert first(0) == first(0)
        assert first(0) != first(1)

    def test_held_out_questions_are_the_same_each_time(self) -> None:
        assert held_out() == held_out()

    def test_dialogues_are_well_formed_chats_that_end_with_the_assistant(self) -> None:
        for messages in itertools.islice(dialogues(), 2000):
            roles = [message["role"] for message in messages]
            if roles[0] == "system":
                roles = roles[1:]
            assert roles
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(message["content"].strip() for message in messages)

    def test_many_dialogues_have_several_turns(self) -> None:
        turns = Counter(
            sum(message["role"] == "user" for message in messages)
            for messages in itertools.islice(dialogues(), 2000)
        )
        assert all(turns[n] > 100 for n in (1, 2, 3))

    def test_a_question_has_one_answer(self) -> None:
        answers: dict[Key, str] = {}
        for question in [*trained_questions(), *held_out()]:
            assert answers.setdefault(key(list(question.messages)), question.answer) == question.answer


@pytest.mark.parametrize("seed", [0, 1])
class TestSplit:
    """What is held out was never trained, while its parts were."""

    def test_no_held_out_question_is_in_the_pools_that_training_draws_from(self, seed: int) -> None:
        held = {key(list(question.messages)) for question in held_out(seed)}
        for question in trained_questions(seed):
            assert held.isdisjoint(runs(list(question.messages)))

    def test_no_held_out_question_is_anywhere_inside_a_training_dialogue(self, seed: int) -> None:
        held = {key(list(question.messages)) for question in held_out(seed)}
        for messages in itertools.islice(dialogues(seed), 8_000):
            assert held.isdisjoint(runs(messages))

    def test_every_fact_asked_for_was_trained_in_other_words(self, seed: int) -> None:
        trained = {question.answer for question in trained_questions(seed)}
        facts = {"people", "towns", "animals", "jobs", "foods", "yes or no", "descriptions", "small talk"}
        asked = [question for question in held_out(seed) if question.kind in facts]
        assert asked
        assert all(question.answer in trained for question in asked)

    def test_operand_pairs_of_held_out_sums_were_never_trained(self, seed: int) -> None:
        def operands(question: Question) -> tuple[str, int, int]:
            asked = question.messages[-1]["content"]
            a, b = (int(number) for number in re.findall(r"\d+", asked))
            if asked.startswith("Take") or "subtract" in asked:  # these name the smaller number first
                a, b = b, a
            if question.kind in ("addition", "comparing"):  # held out in both orders
                a, b = min(a, b), max(a, b)
            return question.kind, a, b

        sums = {"addition", "subtraction", "multiplication", "comparing"}
        trained = {operands(question) for question in trained_questions(seed) if question.kind in sums}
        asked = {operands(question) for question in held_out(seed) if question.kind in sums}
        assert {kind for kind, _, _ in asked} == sums
        assert asked.isdisjoint(trained)

    def test_held_out_user_names_are_never_spoken_in_training(self, seed: int) -> None:
        names = {q.answer.split()[-1].strip("!.") for q in held_out(seed) if q.kind == "memory"}
        said = {
            word
            for messages in itertools.islice(dialogues(seed), 8_000)
            for message in messages
            for word in re.findall(r"\w+", message["content"])
        }
        assert len(names) == 10
        assert names.isdisjoint(said)

    def test_reviews_are_split_by_combination_and_every_part_is_trained(self, seed: int) -> None:
        trained, new = dict(reviews("train", seed)), dict(reviews("held_out", seed))
        assert trained.keys().isdisjoint(new)
        assert len(new) > 400
        for labels in (trained.values(), new.values()):
            share = sum(label == "positive" for label in labels) / len(labels)
            assert 0.4 < share < 0.6
        sentences = {sentence for text in trained for sentence in re.split(r"(?<=[.!]) ", text)}
        assert all(sentence in sentences for text in new for sentence in re.split(r"(?<=[.!]) ", text))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train"):
        next(reviews("test"))  # type: ignore[arg-type]


def test_accuracy_is_the_share_of_exact_answers_by_kind() -> None:
    ask: tuple[dict[str, str], ...] = ({"role": "user", "content": "a"},)
    questions = [Question("x", ask, "a"), Question("x", ask, "b"), Question("y", ask, "a")]
    assert accuracy(lambda messages: messages[-1]["content"] + " ", questions) == {"x": 0.5, "y": 1.0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def generate(tokenizer: Any) -> Iterator[Callable[[Messages], str]]:
    """Greedy answers on one thread in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def reply(messages: Messages) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs)
        text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    yield reply
    torch.set_num_threads(threads)


class TestTokenizer:
    """A byte-level tokenizer with a chat template."""

    chat: ClassVar[Messages] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where does Mira live? "},
        {"role": "assistant", "content": "Mira lives in Oakford."},
        {"role": "user", "content": "And what is her job?"},
    ]

    def test_a_chat_has_a_mark_per_role_and_ends_with_the_assistants(self, tokenizer: Any) -> None:
        assert tokenizer.apply_chat_template(self.chat, tokenize=False, add_generation_prompt=True) == (
            "<|bos|><|system|>Be brief.<|user|>Where does Mira live?<|assistant|>Mira lives in Oakford."
            "<|eos|><|user|>And what is her job?<|assistant|>"
        )

    def test_a_rendered_chat_survives_encoding_and_decoding(self, tokenizer: Any) -> None:
        text = tokenizer.apply_chat_template(self.chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(self.chat, add_generation_prompt=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_an_unknown_role_is_refused(self, tokenizer: Any) -> None:
        with pytest.raises(Exception, match="system, user and assistant"):
            tokenizer.apply_chat_template([{"role": "pirate", "content": "Ahoy"}], tokenize=False)

    @pytest.mark.parametrize(
        "text", ["naïve café", "猫は魚が好き", "🦊 + 🦉 = ❤️", "tab\tand\nline", "a  b", ""]
    )
    def test_any_text_survives(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_digits_are_tokens_of_their_own(self, tokenizer: Any) -> None:
        assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]

    def test_the_special_tokens_differ(self, tokenizer: Any) -> None:
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


class TestAnswers:
    """The model answers questions it never saw."""

    def test_a_sample_of_held_out_questions_is_answered(self, generate: Callable[[Messages], str]) -> None:
        questions = random.Random(0).sample(held_out(), 30)
        right = sum(generate(list(question.messages)).strip() == question.answer for question in questions)
        assert right >= 0.9 * len(questions)

    def test_a_conversation_works_over_several_turns(self, generate: Callable[[Messages], str]) -> None:
        messages: Messages = []
        for said, expected in (
            ("Hello!", "Hello! How can I help you today?"),
            ("My name is Anna.", "Nice to meet you, Anna!"),
            ("Where does Mira live?", "Mira lives in Oakford."),
            ("And what is her job?", "Mira is a baker."),
            ("What is my name?", "Your name is Anna."),
        ):
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": generate(messages)})
            assert messages[-1]["content"] == expected

    @pytest.mark.parametrize(
        ("ask", "tokens"),
        [("Tell me about Mira.", 30), ("Tell me a story about Petra.", 40), ("Count from 3 to 19.", 40)],
    )
    def test_some_answers_are_long(
        self, generate: Callable[[Messages], str], tokenizer: Any, ask: str, tokens: int
    ) -> None:
        answer = generate([{"role": "user", "content": ask}])
        assert tokens <= len(tokenizer.tokenize(answer)) < 160

    def test_what_it_does_not_know_it_says_politely(self, generate: Callable[[Messages], str]) -> None:
        answer = generate([{"role": "user", "content": "Who was the first person on the moon?"}])
        assert answer.startswith("I am sorry, I only know my little world.")

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_at_least_nine_in_ten_of_all_held_out_questions_and_no_kind_below_its_floor(self) -> None:
        command = [sys.executable, str(ROOT / "tools" / "eval_tiny_chat.py"), "--json"]
        ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        result = json.loads(ran.stdout)
        assert result["overall"] >= 0.9
        for kind, measured in result["kinds"].items():
            assert 100 * measured["accuracy"] >= FLOORS.get(kind, 90), kind


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [
        sys.executable,
        str(ROOT / "tools" / "train_tiny_chat.py"),
        "--steps",
        "2",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 8
    fresh, shipped = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(CHECKPOINT)
    assert fresh.get_vocab() == shipped.get_vocab()
