"""What the comparison with llama.cpp does without llama.cpp: weights as it wants them, and its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The benchmark and its processes of llama.cpp, which are no part of the package."""
    sys.path.insert(0, str(HERE))
    import beside_llama_cpp
    import llama_cpp_process

    yield beside_llama_cpp, llama_cpp_process
    sys.path.remove(str(HERE))
    del sys.modules["beside_llama_cpp"], sys.modules["llama_cpp_process"]


@pytest.fixture
def benchmark(scripts: tuple[ModuleType, ModuleType]) -> ModuleType:
    return scripts[0]


@pytest.fixture
def process(scripts: tuple[ModuleType, ModuleType]) -> ModuleType:
    return scripts[1]


def turned_in_pairs(row: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """llama.cpp's rotary embedding of one head `[width]`: components 2i and 2i + 1 turn together."""
    even, odd = row[0::2], row[1::2]
    turned = [even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)]
    return np.stack(turned, 1).reshape(-1)


def test_reordered_weights_give_the_same_scores_with_the_other_rotary_embedding(process: ModuleType) -> None:
    heads, width, inputs = 2, 8, 5
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, heads * width, inputs))
    x = random.normal(size=inputs)
    angles = random.normal(size=width // 2)
    doubled = torch.tensor(np.concatenate([angles, angles]))[None, None]
    q, k = (torch.tensor((w @ x).reshape(1, heads, 1, width)) for w in (query, key))
    q, _ = apply_rotary_pos_emb(q, k, doubled.cos(), doubled.sin())
    expected = (q * k).sum(-1).flatten().numpy()
    other_q, other_k = ((process.interleaved(w, heads) @ x).reshape(heads, width) for w in (query, key))
    found = [turned_in_pairs(a, angles) @ b for a, b in zip(other_q, other_k, strict=True)]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ],
)
def test_a_weight_has_the_name_that_llama_cpp_looks_for(
    process: ModuleType, name: str, expected: str
) -> None:
    assert process.gguf_name(name) == expected


def test_another_architecture_is_not_converted(process: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="is not a Llama"):
        process.convert(tmp_path, tmp_path / "model.gguf")


def test_a_ratio_is_the_median_of_ratios_within_rounds(benchmark: ModuleType) -> None:
    speeds = {benchmark.OURS: [10.0, 20.0, 90.0], "llama.cpp": [5.0, 20.0, 30.0]}
    found = benchmark.row(benchmark.CASES[0], speeds, speeds)
    assert found["times_as_fast_as"] == {"llama.cpp": 2.0}


def test_a_first_token_is_told_in_seconds_and_sooner_is_faster(benchmark: ModuleType) -> None:
    (case,) = (case for case in benchmark.CASES if case.tokens == 1)
    first_s = {benchmark.OURS: [2.0], "llama.cpp": [3.0]}
    speeds = {name: [benchmark.Answered([], s, s).speed(case)] for name, (s,) in first_s.items()}
    found = benchmark.row(case, speeds, first_s)
    assert (found["found"]["llama.cpp"], found["times_as_fast_as"]["llama.cpp"]) == (3.0, 1.5)


def test_systems_that_answer_differently_are_not_compared(benchmark: ModuleType) -> None:
    class Says:
        def __init__(self, token: int) -> None:
            self.token = token

        def answer(self, prompts: torch.Tensor, tokens: int) -> object:
            return benchmark.Answered([[self.token] * tokens], 1.0, 2.0)

    with pytest.raises(AssertionError, match=r"llama\.cpp gives other tokens than swarmkit"):
        benchmark.measure(benchmark.CASES[0], {benchmark.OURS: Says(5), "llama.cpp": Says(6)}, 100, 1)
