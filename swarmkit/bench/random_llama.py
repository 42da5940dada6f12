"""A Llama with random weights, of the size that the engine's targets are written for ("model M")."""

from __future__ import annotations

from pathlib import Path

import torch


def make_random_llama(
    folder: Path,
    *,
    hidden_size: int = 1024,
    num_blocks: int = 16,
    num_heads: int = 16,
    num_kv_heads: int = 4,
    intermediate_size: int = 2816,
    vocab_size: int = 32_000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint in Hugging Face format to `folder`.

    The same seed gives the same weights on a device of the same kind.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="256MB")
    return folder
