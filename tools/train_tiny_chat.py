"""Train the shipped model ``tiny-chat`` from nothing: tokenizer, weights and configuration.

The same seed and the same number of threads give the same model again on the same kind of processor. Measure
the result with ``python -m tools.eval_tiny_chat --model OUT``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swarmkit.tinychat import CHECKPOINT
from tools.tinychat.world import dialogues

VOCABULARY = 1200
MOST_POSITIONS = 2048
TOKENS_PER_STEP = 2048
ROW_LENGTHS = (128, 256, 512, 1024)
ROW_LENGTH_WEIGHTS = (35, 45, 15, 5)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('tiny-chat knows the roles system, user and assistant') -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + (message.content | trim) -}}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from dialogues; every digit stays a token of its own so that sums generalise."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'s|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(dialogues(seed), 30_000)
    tokenizer.train_from_iterator((m["content"] for messages in sample for m in messages), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MOST_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 8 blocks with fresh weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MOST_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Dialogues as (token ids, labels); only what the assistant says is learned."""
    roles = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLES.items()}
    stream = dialogues(seed)
    while True:
        batch = list(itertools.islice(stream, 512))
        texts = [message["content"] for messages in batch for message in messages]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for messages in batch:
            ids, labels = [tokenizer.bos_token_id], [-100]
            for message in messages:
                said = next(encoded)
                speaks = message["role"] == "assistant"
                turn = [*said, tokenizer.eos_token_id] if speaks else said
                ids += [roles[message["role"]], *turn]
                labels += [-100, *(turn if speaks else [-100] * len(turn))]
            yield ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows packed with dialogues. Row lengths vary, so that far positions are seen as well as near ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(ROW_LENGTH_WEIGHTS, dtype=torch.float)
    stream = token_stream(tokenizer, seed)
    while True:
        length = ROW_LENGTHS[int(torch.multinomial(weights, 1, generator=generator))]
        rows = []
        for _ in range(TOKENS_PER_STEP // length):
            ids: list[int] = []
            labels: list[int] = []
            while len(ids) < length:
                more_ids, more_labels = next(stream)
                ids += more_ids
                labels += more_labels
            rows.append((ids[:length], labels[:length]))
        yield torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then half a cosine down to a hundredth of the peak."""
    warm_up = max(1, min(200, steps // 10))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> None:
    """Train and save."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(len(tokenizer), tokenizer)
    torch.nn.Module.to(model, args.device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    columns = (
        TextColumn("training tiny-chat"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    data = batches(tokenizer, args.seed)
    smooth = 0.0
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=args.steps, loss=float("nan"))
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            ids, labels = next(data)
            with torch.autocast(args.device, torch.bfloat16, enabled=not args.full_precision):
                loss = model(input_ids=ids.to(args.device), labels=labels.to(args.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
            progress.update(task, advance=1, loss=smooth)
            if args.save_every and (step + 1) % args.save_every == 0:
                save(model, tokenizer, args.out)
            if not progress.console.is_terminal and step % 100 == 0:
                progress.console.print(f"step {step} loss {smooth:.4f}")
    save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write an ordinary Hugging Face folder. float16 keeps three more bits of each weight than bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    halved = copy.deepcopy(model)
    torch.nn.Module.to(halved, "cpu", torch.float16)
    halved.generation_config.do_sample = False
    halved.generation_config.max_new_tokens = 160
    halved.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The class name of the ordinary fast tokenizer is the one that all versions of transformers know.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the dialogues, the split and the weights"
    )
    parser.add_argument(
        "--steps", type=int, default=3600, help=f"optimizer steps of {TOKENS_PER_STEP} tokens"
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write the checkpoint to")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--save-every", type=int, default=0, help="also save every so many steps; 0 saves at the end"
    )
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--device", default="cpu", help="torch device type, such as cpu or cuda")
    parser.add_argument(
        "--full-precision", action="store_true", help="compute in float32 instead of bfloat16"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
