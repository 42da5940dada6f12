"""What does a lower precision cost? Accuracy of tiny-chat and divergence of its logits, chain by chain.

    python benchmarks/precision.py --json > benchmarks/results/precision-tiny-chat.json

For every precision, and for chains whose two halves differ in precision, two servers in this process answer
the same held-out questions. The logits at every token of the right answers are compared with the local
float32 model's: mean Kullback-Leibler divergence, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swarmkit.bench.environment import environment
from swarmkit.cli.console import quiet_transformers
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.tinychat import Question, held_out

CHAINS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("int8", "int8"),
    ("nf4", "nf4"),
    ("float32", "bfloat16"),
    ("bfloat16", "int8"),
    ("int8", "nf4"),
    ("float32", "nf4"),
)


@dataclass(frozen=True)
class Row:
    """One chain: the precisions of its first and second half, and what came of it."""

    first: str
    second: str
    questions: int
    exact: float
    tokens: int
    same_token: float
    kl_divergence: float


def measure(chain: tuple[str, str], questions: list[Question], show: bool) -> Row:
    """Let one chain answer; returns its row."""
    with LocalSwarm("tiny-chat", num_stages=1, transport="memory") as swarm:
        swarm.servers[0].kill()
        half = swarm.checkpoint.num_blocks // 2
        swarm.add_server((0, half), dtype=chain[0])
        swarm.add_server((half, swarm.checkpoint.num_blocks), dtype=chain[1])
        model, tokenizer = swarm.model(), swarm.tokenizer()
        local = load_local(swarm.checkpoint, dtype=torch.float32)
        exact = same = tokens = 0
        divergence = 0.0
        for question in track(questions, " + ".join(chain), console=Console(stderr=True), disable=not show):
            inputs = tokenizer.apply_chat_template(
                question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            prompt = inputs["input_ids"]
            right = tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            whole = torch.cat([prompt, right], dim=1)
            with torch.no_grad():
                expected = local(whole).logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
                found = model(whole).logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
            divergence += float(torch.sum(expected.exp() * (expected - found)))
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
            tokens += expected.shape[0]
            out = model.generate(**inputs, max_new_tokens=120, do_sample=False)
            answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
            exact += int(answer.strip() == question.answer.strip())
    return Row(*chain, len(questions), exact / len(questions), tokens, same / tokens, divergence / tokens)


def main() -> None:
    """Measure every chain and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=200, help="held-out questions, drawn with a seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_transformers()
    everything = held_out()
    questions = random.Random(0).sample(everything, min(options.questions, len(everything)))
    rows = [measure(chain, questions, sys.stderr.isatty()) for chain in CHAINS]
    if options.json:
        told = environment() | {"command": "python benchmarks/precision.py " + " ".join(sys.argv[1:])}
        print(json.dumps(told | {"benchmark": "precision", "rows": [asdict(row) for row in rows]}, indent=2))
        return
    table = Table("first half", "second half", "exact answers", "same token", "KL divergence")
    for row in rows:
        figures = (f"{row.exact:.1%}", f"{row.same_token:.1%}", f"{row.kl_divergence:.2e}")
        table.add_row(row.first, row.second, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
