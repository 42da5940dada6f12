"""The check finds right cuts right and broken ones broken, for any config, and remembers what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from swarmkit.cli.commands import app
from swarmkit.errors import ModelError
from swarmkit.models import check
from swarmkit.models.architecture import anatomy, quirks
from swarmkit.models.architecture.anatomy import Anatomy
from swarmkit.models.architecture.quirks import FAMILIES, REFUSED, Family
from swarmkit.models.check import TOLERANCE, check_architecture, config_of, ensure_servable, shrink
from swarmkit.models.execution.full_sequences import FullSequencePass

from .tiny import ARCHITECTURES, tiny_config

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


KINDS = frozenset(
    {
        "bloom",
        "deepseek_v3",
        "falcon@new",
        "gemma3_text",
        "gpt2",
        "gpt_oss",
        "granite",
        "llama",
        "llama4_text",
        "opt@post_norm",
        "qwen3_next",
    }
)
"""Between them they have every way to tell places, every kind of block and every number that is applied once.

All that are promised are compared with the uncut model in `test_equality`.
"""


def some_slowly(name: str) -> object:
    return pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)


@pytest.mark.parametrize("name", map(some_slowly, ARCHITECTURES))
def test_every_supported_architecture_agrees(name: str) -> None:
    verdict = check_architecture(tiny_config(name))
    assert verdict.agrees, verdict.reason
    assert verdict.cuts >= 5
    assert max(verdict.worst_prefill, verdict.worst_decode, verdict.worst_backward) < 1e-5


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "llama4_text", "qwen3_next", "gemma3_text", "mimo_v2_flash"]
)
def test_a_published_config_shrinks_and_keeps_every_kind_of_block(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    tiny = shrink(config)
    assert tiny.num_hidden_layers <= 8
    if getattr(config, "layer_types", None):
        assert set(tiny.layer_types) == set(config.layer_types)
    if model_type == "deepseek_v3":
        assert 0 < tiny.first_k_dense_replace < tiny.num_hidden_layers


def test_an_architecture_that_nobody_has_listed_is_tried() -> None:
    assert "gptj" not in FAMILIES
    assert check_architecture(config_of("gptj")).agrees


def differs(config: object) -> check.Verdict:
    verdict = check_architecture(config)  # type: ignore[arg-type]
    assert not verdict.agrees
    assert verdict.reason
    return verdict


def test_a_multiplier_that_is_applied_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("granite")
    monkeypatch.setattr(quirks, "FAMILIES", {**FAMILIES, "granite": Family()})
    verdict = differs(config)
    assert verdict.worst_prefill > 100 * TOLERANCE
    assert verdict.worst_backward > 100 * TOLERANCE
    assert re.search(r"blocks 0:4, it differs in prefill", verdict.reason)


def test_a_norm_that_is_left_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Anatomy, "neutralise", lambda self, base: None)
    assert differs(tiny_config("llama")).worst_decode > 100 * TOLERANCE


def test_a_wrong_gradient_in_the_pass_that_servers_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = FullSequencePass.begin_backward

    def slightly_wrong(run: FullSequencePass, gradient: torch.Tensor) -> None:
        begin(run, gradient * 1.001)

    monkeypatch.setattr(FullSequencePass, "begin_backward", slightly_wrong)
    verdict = differs(tiny_config("llama"))
    assert verdict.worst_prefill < TOLERANCE
    assert "differs in the backward pass" in verdict.reason


def test_positions_that_are_added_twice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Anatomy.neutralise
    torch.manual_seed(0)

    def but_for_positions(self: Anatomy, base: object) -> None:
        positions = base.wpe  # type: ignore[attr-defined]
        original(self, base)  # type: ignore[arg-type]
        base.wpe = positions  # type: ignore[attr-defined]
        torch.nn.init.normal_(positions.weight)

    monkeypatch.setattr(Anatomy, "neutralise", but_for_positions)
    differs(tiny_config("gpt2"))


def test_blocks_of_another_kind_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "LEADING_BLOCKS", ())
    assert (
        "cut into blocks 0:1, 1:4, it fails: ModelError: the tiny checkpoint, blocks [1, 4), misses"
        in differs(tiny_config("deepseek_v3")).reason
    )


def test_a_config_whose_blocks_depend_on_their_index_is_found() -> None:
    differs(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    check_architecture(tiny_config("llama"))
    assert torch.equal(torch.rand(3), wanted)


class CheckedTwiceError(BaseException):
    """No `Exception`, which the check would take for a fault of the model, and remember."""


def test_a_verdict_is_found_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_servable(tiny_config("llama"))

    def not_again(*args: object) -> None:
        raise CheckedTwiceError

    monkeypatch.setattr(check, "load_local", not_again)
    assert ensure_servable(tiny_config("llama", vocab_size=99)) == first
    with pytest.raises(CheckedTwiceError):
        ensure_servable(tiny_config("llama", attention_bias=True))
    monkeypatch.setattr(quirks, "FAMILIES", {**FAMILIES, "llama": Family(stage_config={"new": 1})})
    with pytest.raises(CheckedTwiceError):
        ensure_servable(tiny_config("llama"))


def test_a_verdict_on_the_same_config_is_remembered_for_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(check, "recall", kept.get)
    monkeypatch.setattr(check, "remember", kept.__setitem__)
    monkeypatch.setattr(
        check, "compare_cuts", lambda tiny: check.Verdict("llama", True, 1, 0.0, 0.0, 0.0, "")
    )
    first = ensure_servable(tiny_config("llama"))

    def not_again(*args: object) -> None:
        raise AssertionError("made small again")

    monkeypatch.setattr(check, "SHRUNK", {})  # as in another process
    monkeypatch.setattr(check, "shrink", not_again)
    moved = tiny_config("llama")
    moved._name_or_path = "elsewhere"
    assert ensure_servable(moved) == first


def test_a_config_is_made_small_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_servable(tiny_config("llama"))

    def not_again(*args: object) -> None:
        raise AssertionError("made small twice")

    monkeypatch.setattr(check, "shrink", not_again)
    ensure_servable(tiny_config("llama"))
    with pytest.raises(AssertionError, match="made small twice"):
        ensure_servable(tiny_config("llama", max_position_embeddings=77))


def test_what_differs_is_not_servable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quirks, "FAMILIES", {**FAMILIES, "granite": Family()})
    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"'granite' models cannot be served.*differs in prefill.*swarmkit check"
        ):
            ensure_servable(tiny_config("granite"))


@pytest.mark.parametrize("model_type", sorted({*REFUSED, "qwen3_5"} & set(CONFIG_MAPPING)))
def test_what_is_refused_says_why(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    with pytest.raises(ModelError, match="cannot be cut into blocks") as caught:
        ensure_servable(config)
    assert REFUSED.get(model_type, "") in str(caught.value)
    assert not check_architecture(config).agrees


def test_rotary_embeddings_that_change_with_the_session_are_refused() -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    with pytest.raises(ModelError, match="dynamic"):
        ensure_servable(config)


def test_a_config_of_quantised_weights_is_checked_without_them() -> None:
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4", "dequantize": True}
    assert ensure_servable(config).agrees


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_what_is_no_causal_model_is_not_servable(model_type: str) -> None:
    with pytest.raises(ModelError):
        ensure_servable(CONFIG_MAPPING[model_type]())


# ---------------------------------------------------------------------- the command


def test_the_command_takes_a_type_a_config_file_and_a_folder(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    for model in ("olmo2", str(tmp_path / "config.json"), str(tmp_path)):
        result = CliRunner().invoke(app, ["check", model])
        assert result.exit_code == 0, result.output
        assert "agrees" in result.output


def test_the_command_tells_programs_what_differs(tmp_path: Path) -> None:
    tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["agrees"] is False
    assert told["worst_prefill"] > 100 * TOLERANCE
    refused = CliRunner().invoke(app, ["check", "mamba", "--json"])
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["worst_prefill"] is None


def test_the_command_refuses_what_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert isinstance(result.exception, ModelError)


# ---------------------------------------------------------------------- the table for people


def test_the_documentation_lists_exactly_what_the_table_says() -> None:
    works, refused = DOCS.read_text(encoding="utf-8").split("## Refused")
    assert re.findall(r"^\| `(\w+)` \|", works, re.MULTILINE) == sorted(FAMILIES)
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", refused, re.MULTILINE)) == dict(REFUSED)
