"""Measure ``tiny-chat`` on the questions held out from its training: greedy answers that match exactly."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarmkit.tinychat import CHECKPOINT, Question, accuracy
from tools.tinychat.world import held_out


def replies(folder: Path, questions: list[Question], batch: int, quiet: bool) -> list[str]:
    """Answer all questions greedily in float32, in left-padded batches of about the same length."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(list(q.messages), tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].answer), len(prompts[i])))
    answers = [""] * len(questions)
    starts = range(0, len(order), batch)
    for start in track(starts, "answering", console=Console(stderr=True, quiet=quiet)):
        rows = order[start : start + batch]
        inputs = tokenizer(
            [prompts[i] for i in rows], padding=True, add_special_tokens=False, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=160,
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


def main() -> None:
    """Read the command line, answer, and print a table by kind of question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder; default tiny-chat")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split; must be the one of the training"
    )
    parser.add_argument("--batch", type=int, default=32, help="questions answered at a time")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--wrong", action="store_true", help="also print every wrong answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    questions = held_out(args.seed)
    answers = replies(args.model, questions, args.batch, quiet=args.json)
    given = iter(answers)
    shares = accuracy(lambda _: next(given), questions)
    counts = Counter(question.kind for question in questions)
    overall = sum(shares[kind] * counts[kind] for kind in shares) / len(questions)
    if args.json:
        kinds = {kind: {"questions": counts[kind], "accuracy": shares[kind]} for kind in shares}
        print(json.dumps({"overall": overall, "questions": len(questions), "kinds": kinds}, indent=2))
        return
    console = Console()
    table = Table("kind of question", "questions", "exact answers", title="held-out accuracy")
    for kind, share in shares.items():
        table.add_row(kind, str(counts[kind]), f"{share:.1%}")
    table.add_section()
    table.add_row("all", str(len(questions)), f"{overall:.1%}")
    console.print(table)
    if args.wrong:
        for question, answer in zip(questions, answers, strict=True):
            if answer.strip() != question.answer:
                asked = " / ".join(message["content"] for message in question.messages)
                print(f"{question.kind}: {asked}\n  said:   {answer}\n  wanted: {question.answer}")


if __name__ == "__main__":
    main()
