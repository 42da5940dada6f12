"""Random checkpoints of every supported architecture, small enough to make in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from swarmkit.models.execution.stage import Stage, StageCache

VOCABULARY = 61
WINDOW = 6
"""Sliding windows are shorter than the tests' sequences, so that their masks matter."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_OWN: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {"num_key_value_heads": None, "intermediate_size": None},
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW, "logit_scale": 0.5},
    "deepseek_v3": {
        "num_key_value_heads": None,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "falcon": {"intermediate_size": None, "num_key_value_heads": None},
    "falcon@alibi": {
        "intermediate_size": None,
        "num_key_value_heads": None,
        "alibi": True,
        "parallel_attn": False,
        "multi_query": False,
    },
    "falcon@new": {
        "intermediate_size": None,
        "num_key_value_heads": None,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "full_attention",
        ],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
    },
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {
        "head_dim": 8,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_oss": {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": {"embedding_multiplier": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama": {"tie_word_embeddings": False},
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 6,
        "floor_scale": 4,
    },
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 8, "sliding_window": WINDOW},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "mpt": {
        "num_key_value_heads": None,
        "intermediate_size": None,
        "max_position_embeddings": None,
        "max_seq_len": 128,
    },
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 48, "word_embed_proj_dim": 24},
    "opt@post_norm": {
        "num_key_value_heads": None,
        "intermediate_size": None,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3_next": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": [
            "linear_attention",
            "full_attention",
            "linear_attention",
            "linear_attention",
            "full_attention",
        ],
    },
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
}

ARCHITECTURES = sorted(_OWN)
"""Model types; after an @ one of the shapes that models of that type may have."""

PROMISED = frozenset(
    {
        "bloom",
        "cohere2",
        "deepseek_v3",
        "falcon",
        "falcon@alibi",
        "falcon@new",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "mpt",
        "olmo2",
        "opt",
        "opt@post_norm",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Tested at every boundary each time; the others only by the slow tests, and by the quick ones in brief."""

RECURRENT = frozenset({"qwen3_next"})
"""Model types whose blocks have a state that is not made of tokens."""


def model_type_of(name: str) -> str:
    """The model type of an architecture's name."""
    return name.partition("@")[0]


def tiny_config(model_type: str, num_blocks: int = 5, **changes: Any) -> PreTrainedConfig:
    own = {**_COMMON, **_OWN.get(model_type, {}), **changes}
    own = {key: value for key, value in own.items() if value is not None}
    return CONFIG_MAPPING[model_type_of(model_type)](num_hidden_layers=num_blocks, **own)


def make_checkpoint(
    tmp_path: Path, model_type: str, num_blocks: int = 5, shards: int = 1, seed: int = 0, **changes: Any
) -> Path:
    """A folder below `tmp_path` with a random model of `model_type`, in about `shards` safetensors files."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, num_blocks, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Untrained weights are so even that many a mistake would leave the tokens as they are.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    folder = tmp_path / f"{model_type}-{num_blocks}-{shards}-{seed}"
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    return folder


def gradient_of(
    stage: Stage,
    hidden: Tensor,
    grad_output: Tensor,
    start: int,
    stop: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to `hidden` of blocks [start, stop), by one call of autograd over all of
    them.
    """
    with torch.enable_grad():
        given = hidden.to(stage.device, stage.dtype).clone().requires_grad_()
        out = stage.run_full_sequences(given, start, stop, attention_mask, position_ids)
        (gradient,) = torch.autograd.grad(out, given, grad_output.to(stage.device, stage.dtype))
    return gradient


def quantise_mxfp4(folder: Path) -> None:
    """Replace the experts of a gpt_oss checkpoint (in one file) by random ones in its publisher's format."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj") and ".experts." in key]:
        experts, inside, outside = tensors.pop(key).shape
        shape = (experts, outside, inside // 32)  # 32 values share a scale
        scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
        values = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors |= {f"{key}_blocks": values, f"{key}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


class StageChain(nn.Module):
    """What a head calls, running some stages in this process; `caches` is the one session it has."""

    def __init__(self, stages: list[Stage], ranges: list[tuple[int, int]] | None = None) -> None:
        super().__init__()
        self.stages = stages
        self.ranges = ranges or [(stage.start, stage.stop) for stage in stages]
        self.caches: list[StageCache] = []
        self.start_session()

    def start_session(self) -> None:
        self.caches = [stage.new_cache(*ends) for stage, ends in zip(self.stages, self.ranges, strict=True)]

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        mask = kwargs["attention_mask"]
        assert mask is None or (mask.ndim == 2 and mask.dtype == torch.bool)
        assert "past_key_values" in kwargs
        positions = kwargs.get("position_ids")
        if mask is not None and bool(mask.all()):
            mask = None  # as a session does
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden = stage.forward(hidden, cache, attention_mask=mask, position_ids=positions)
        return hidden.clone()
