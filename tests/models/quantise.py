"""Tiny checkpoints whose weights are stored quantised, in the formats that are published on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

GROUP = 32
"""Inputs of a matrix that share a scale."""
TILE = 16
"""Rows and columns of a matrix that share a scale, in FP8."""
PLAIN = "model.layers.1.self_attn.o_proj"
"""One matrix that is left as it is, as publishers do; they name it by the number of its block."""


def with_bitsandbytes(folder: Path, kind: str) -> None:
    """Save a checkpoint again as nf4, fp4 or int8, by transformers itself."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(**four)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)


def to_fp8(folder: Path) -> None:
    """Fine-grained FP8, as DeepSeek and Qwen publish it."""

    def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % TILE, 0, -rows % TILE))
        tiles = padded.reshape(-(-rows // TILE), TILE, -(-columns // TILE), TILE)
        scales = tiles.abs().amax((1, 3)) / 448
        values = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
        return {f"{name}.weight": values.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}
    _replace(folder, quantise, {**config, "modules_to_not_convert": [PLAIN, "lm_head"]})


def to_gptq(folder: Path) -> None:
    """GPTQ of four bits, with random values: what is compared is how they are read."""

    def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        return {
            f"{name}.qweight": _bits(inputs // 8, outputs),
            f"{name}.qzeros": _bits(inputs // GROUP, outputs // 8),
            f"{name}.scales": _scales(inputs // GROUP, outputs).half(),
            f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    _replace(folder, quantise, {**config, "checkpoint_format": "gptq"}, plain="")


def to_awq(folder: Path) -> None:
    """AWQ of four bits, with random values."""

    def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        return {
            f"{name}.qweight": _bits(inputs, outputs // 8),
            f"{name}.qzeros": _bits(inputs // GROUP, outputs // 8),
            f"{name}.scales": _scales(inputs // GROUP, outputs).half(),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    _replace(folder, quantise, {**config, "modules_to_not_convert": [PLAIN, "lm_head"]})


def to_compressed_tensors(folder: Path) -> None:
    """Packed integers of four bits, as llm-compressor writes them, with random values."""

    def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        return {
            f"{name}.weight_packed": _bits(outputs, inputs // 8),
            f"{name}.weight_scale": _scales(outputs, inputs // GROUP),
            f"{name}.weight_shape": torch.tensor([outputs, inputs]),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [PLAIN, "lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    _replace(folder, quantise, config)


def _replace(
    folder: Path,
    quantise: Callable[[str, Tensor], dict[str, Tensor]],
    config: dict[str, Any],
    plain: str = PLAIN,
) -> None:
    """Quantise the matrices of a checkpoint, but for the one called `plain`."""
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith("_proj.weight") and key != f"{plain}.weight"]:
            tensors |= quantise(key.removesuffix(".weight"), tensors.pop(key))
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    if (index := folder / "model.safetensors.index.json").exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(content))


def _bits(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 0.01
