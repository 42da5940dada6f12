"""How often does a token change because a lost server's cache was rebuilt by another one?

    python benchmarks/replay_agreement.py                   float32 and bfloat16, on tiny-chat
    python benchmarks/replay_agreement.py --dtype bfloat16 --answers 100 --json

A replay sends the kept inputs through the new server in one step, where the old one saw most of them token
by token. The sums are the same but for the order of their terms, so in lower precision keys and values may
differ by rounding, and a token whose two best candidates are nearly equal may change. Every answer is
generated twice, greedily: undisturbed, and with a server killed after a random token.

Reported for each dtype:

    answers_changed   answers that differ in any token
    tokens_changed    tokens that differ; after the first change the texts go their own ways
    first_changes_per_token   changes per token generated behind a kill while the texts were still the same
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.events import PeerReplaced
from swarmkit.tinychat import held_out

_TEXTS = ("Once upon a time", "The weather today is", "In the beginning there was", "My favourite food is")


@dataclass
class Agreement:
    """What was counted for one dtype."""

    dtype: str
    answers: int = 0
    tokens: int = 0
    kills: int = 0
    tokens_behind_kills: int = 0
    answers_changed: int = 0
    tokens_changed: int = 0
    first_changes_per_token: float = 0.0

    def add(self, undisturbed: list[int], disturbed: list[int], killed_after: int) -> None:
        """Compare two answers, the second of which met a kill once `killed_after` tokens were there."""
        length = max(len(undisturbed), len(disturbed))
        same = sum(one == other for one, other in zip(undisturbed, disturbed, strict=False))
        pairs = enumerate(zip(undisturbed, disturbed, strict=False))
        first = next((place for place, (one, other) in pairs if one != other), None)
        changed = undisturbed != disturbed
        if changed and first is None:  # one of them ended before
            first = min(len(undisturbed), len(disturbed))
        self.answers += 1
        self.tokens += length
        self.kills += 1
        self.answers_changed += changed
        self.tokens_changed += length - same
        self.tokens_behind_kills += (length if first is None else first + 1) - killed_after
        self.first_changes_per_token = self.answers_changed / max(1, self.tokens_behind_kills)


class _Kill(LogitsProcessor):  # type: ignore[misc]
    """Calls `kill` once the model has seen `after` new tokens."""

    def __init__(self, prompt_tokens: int, after: int, kill: Callable[[], None]) -> None:
        self._at, self._kill = prompt_tokens + after, kill

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self._at:
            self._kill()
        return scores


def measure(
    name: str, dtype: str, answers: int, tokens: int, least: int, seed: int, tick: Callable[[], object]
) -> Agreement:
    """Generate `answers` answers of at most `tokens` tokens, twice each."""
    chance = random.Random(seed)
    found = Agreement(dtype)
    with LocalSwarm(name, num_stages=2, replicas=2, transport="memory", dtype=dtype) as swarm:
        model, tokenizer = swarm.model(dtype=dtype), swarm.tokenizer()
        replacements = model.subscribe(2 * answers, PeerReplaced)
        for number in range(answers):
            ids = _prompt(name, tokenizer, number)
            start = ids.shape[1]
            undisturbed = _generate(model, ids, tokens, least)
            # At the last token there is nothing left to change.
            after = chance.randrange(1, max(2, len(undisturbed) - 1))
            stage = chance.randrange(2)

            def kill(stage: int = stage) -> None:
                peer_id = model.trace[-1].hops[stage].peer_id
                server = next(server for server in swarm.servers if server.peer_id == peer_id)
                server.kill()
                swarm.add_server(server.blocks, dtype=dtype)

            disturbed = _generate(model, ids, tokens, least, LogitsProcessorList([_Kill(start, after, kill)]))
            found.add(undisturbed, disturbed, after)
            tick()
        replaced = len(replacements.pending())
        if replaced < found.kills:
            raise RuntimeError(f"{found.kills} kills, but only {replaced} replacements")
    return found


def _generate(
    model: SwarmModelForCausalLM, ids: torch.Tensor, tokens: int, least: int, processors: Any = None
) -> list[int]:
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=min(least, tokens),
        logits_processor=processors,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _prompt(name: str, tokenizer: Any, number: int) -> torch.Tensor:
    if name == "tiny-chat":
        questions = held_out()
        messages = list(questions[number * 7 % len(questions)].messages)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{_TEXTS[number % len(_TEXTS)]} {number}"
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=name != "tiny-chat").input_ids
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat", help="tiny-chat, a local folder, or a Hub repo id")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--answers", type=int, default=200, help="per dtype")
    parser.add_argument("--tokens", type=int, default=48, help="at most, per answer")
    parser.add_argument("--at-least", type=int, default=4, help="tokens per answer, even if it would end")
    parser.add_argument("--seed", type=int, default=0, help="decides which server dies after which token")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    with tqdm(total=options.answers * len(options.dtype), unit="answer", file=sys.stderr) as bar:
        for dtype in options.dtype:
            bar.set_description(dtype)
            results.append(
                measure(
                    options.model,
                    dtype,
                    options.answers,
                    options.tokens,
                    options.at_least,
                    options.seed,
                    bar.update,
                )
            )
    if options.json:
        report = environment() | {"command": " ".join(["python", *sys.argv]), "model": options.model}
        print(json.dumps(report | {"seed": options.seed, "results": [asdict(result) for result in results]}))
        return
    for result in results:
        print(
            f"{result.dtype}: {result.answers_changed} of {result.answers} answers and "
            f"{result.tokens_changed} of {result.tokens} tokens changed; "
            f"{result.first_changes_per_token:.2%} per token behind a kill"
        )


if __name__ == "__main__":
    main()
