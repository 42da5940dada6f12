"""Checkpoints whose weights are stored quantised: cut, they are the same; what is missing is said."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import anatomy_of
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import build_head, load_local
from swarmkit.models.plan import weight_bytes
from swarmkit.models.quantization import stored as quantised
from swarmkit.models.quantization.precision import Precision
from swarmkit.models.quantization.stored import StoredQuantisation

from .quantise import to_awq, to_compressed_tensors, to_fp8, to_gptq, with_bitsandbytes
from .test_equality import CUTS, assert_same, prompts
from .tiny import StageChain, gradient_of, make_checkpoint, tiny_config


def a_folder(tmp_path: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model whose matrices are wide enough to be quantised in groups."""
    return make_checkpoint(tmp_path, model_type, **{"hidden_size": 64, "intermediate_size": 128, **changes})


def assert_cut_is_the_same(folder: Path, label: str) -> None:
    opened = Checkpoint.open(folder)
    stages = [Stage.load(opened, start, stop) for start, stop in CUTS]
    assert {stage.precision.name for stage in stages} == {label}
    assert_same(build_head(opened, StageChain(stages)), load_local(opened), *prompts(2, padded=True))


# they work


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_bitsandbytes_has_saved_is_cut_as_it_is(tmp_path: Path, kind: str) -> None:
    folder = a_folder(tmp_path)
    with_bitsandbytes(folder, kind)
    assert_cut_is_the_same(folder, kind)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_fp8_is_expanded_on_loading_and_cut(tmp_path: Path, model_type: str) -> None:
    folder = a_folder(tmp_path, model_type, head_dim=16, moe_intermediate_size=32)
    to_fp8(folder)
    names = Checkpoint.open(folder).weight_map
    assert any(".experts.0." in name for name in names) == (model_type == "qwen3_moe")
    assert_cut_is_the_same(folder, "fp8")


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_fp8_means_what_its_publisher_meant(tmp_path: Path, model_type: str) -> None:
    """Each matrix is close to the one that was quantised, also where it is not made of whole tiles."""
    folder = a_folder(tmp_path, model_type)
    exact = weights_of(folder)
    to_fp8(folder)
    found = weights_of(folder)
    errors = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    assert 0.02 < max(errors.values()) < 0.06


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices of the first two blocks, as a stage has them."""
    stage = Stage.load(Checkpoint.open(folder), 0, 2)
    return {name: weight for name, weight in stage.base.named_parameters() if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    ("quantise", "packages", "label"),
    [
        (to_gptq, ["optimum", "gptqmodel"], "gptq"),
        (to_awq, ["gptqmodel"], "awq"),
        (to_compressed_tensors, ["compressed_tensors"], "compressed"),
    ],
)
def test_with_their_packages_other_formats_are_cut_too(
    tmp_path: Path, quantise: Callable[[Path], None], packages: list[str], label: str
) -> None:
    for package in packages:
        pytest.importorskip(package)
    folder = a_folder(tmp_path)
    quantise(folder)
    assert_cut_is_the_same(folder, label)


def test_the_dtype_to_compute_in_can_be_chosen(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    to_fp8(folder)
    stage = Stage.load(Checkpoint.open(folder), 1, 3, dtype="bfloat16")
    assert (stage.precision.name, stage.dtype) == ("fp8", torch.bfloat16)
    assert {p.dtype for p in stage.base.parameters()} == {torch.bfloat16}


def test_gradients_pass_through_weights_of_four_bits(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    with_bitsandbytes(folder, "nf4")
    stage = Stage.load(Checkpoint.open(folder), 0, 2)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    gradient = gradient_of(stage, hidden, torch.ones_like(hidden), 0, 2)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


# the bytes


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_block_is_planned_with_the_bytes_of_its_tensors(tmp_path: Path, kind: str) -> None:
    folder = a_folder(tmp_path)
    with_bitsandbytes(folder, kind)
    opened = Checkpoint.open(folder)
    tensors = load_file(folder / "model.safetensors")
    largest = max(sum(tensors[key].nbytes for key in opened.block_keys(b, b + 1)) for b in range(5))
    assert weight_bytes(opened, Precision.parse("auto", opened.config)) == largest


def test_expanded_weights_are_planned_with_the_bytes_that_they_take_once_loaded(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    to_fp8(folder)
    opened = Checkpoint.open(folder)
    stage = Stage.load(opened, 0, 1)
    loaded = sum(p.nbytes for p in stage.base.get_submodule("layers").parameters())
    assert weight_bytes(opened, Precision.parse("auto", opened.config)) == pytest.approx(loaded, abs=1)


# what is missing is said


@pytest.mark.parametrize(
    ("quantise", "packages"),
    [
        (to_gptq, "optimum gptqmodel"),
        (to_awq, "gptqmodel"),
        (to_compressed_tensors, "compressed-tensors"),
        (lambda folder: with_bitsandbytes(folder, "nf4"), "bitsandbytes"),
    ],
)
def test_missing_packages_are_named_before_weights_are_read(
    tmp_path: Path, quantise: Callable[[Path], None], packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path)
    quantise(folder)
    monkeypatch.setattr(quantised, "is_installed", lambda package: False)
    opened = Checkpoint.open(folder)  # which a client may do: blocks are not its concern
    (folder / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(ModelError, match=f"pip install {packages}\\. Or give a checkpoint"):
        Stage.load(opened, 0, 1)


@pytest.mark.parametrize(("method", "reason"), [("frobnicate", "frobnicate"), ("aqlm", "aqlm")])
def test_what_transformers_cannot_load_here_is_said_in_its_words(
    tmp_path: Path, method: str, reason: str
) -> None:
    if importlib.util.find_spec(method):
        pytest.skip(f"{method} is installed")
    stored = StoredQuantisation(method, {"quant_method": method})
    with pytest.raises(ModelError, match=f"cannot load here: .*{reason}.*unquantised weights"):
        stored.ensure_loadable("some/model", "cpu")


def test_weights_that_are_quantised_are_not_quantised_again(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    to_fp8(folder)
    with pytest.raises(ModelError, match=r"stored quantised \(fp8\) and cannot be made nf4; choose"):
        Stage.load(Checkpoint.open(folder), 0, 1, dtype="nf4")


def test_what_is_stored_in_nf4_can_be_asked_for_as_nf4(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    with_bitsandbytes(folder, "nf4")
    assert Precision.parse("nf4", Checkpoint.open(folder).config).stored is not None


def test_an_output_layer_that_is_quantised_too_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    to_gptq(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"quantised that are in no block \(lm_head.qweight\)"):
        build_head(Checkpoint.open(folder), torch.nn.Identity())


# names of modules


def of_blocks(names: list[str], start: int = 2, stop: int = 4) -> list[str]:
    stored = StoredQuantisation("fp8", {"quant_method": "fp8", "modules_to_not_convert": names})
    return stored.of_blocks(start, stop, anatomy_of(tiny_config("llama")))["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("name", "in_the_stage"),
    [
        ("model.layers.2.mlp", ["layers.0.mlp"]),
        ("model.layers.3", ["layers.1"]),
        ("layers.3.mlp.up_proj", ["layers.1.mlp.up_proj"]),
        ("model.layers.1.mlp", []),
        ("model.layers.4.mlp", []),
        ("model.layers.30.mlp", []),
        ("lm_head", ["lm_head"]),
        ("model.norm", ["norm"]),
        ("model", ["model"]),
        ("model.layers.*.self_attn", ["layers.*.self_attn"]),
        ("re:model.layers.*.mlp.gate", ["re:layers.*.mlp.gate"]),
        (r"re:^model\.layers\.\d+\.mlp", [r"re:^layers\.\d+\.mlp"]),
        ("re:.*lm_head", ["re:.*lm_head"]),
    ],
)
def test_names_of_modules_are_those_of_the_stage(name: str, in_the_stage: list[str]) -> None:
    assert of_blocks([name]) == in_the_stage


@pytest.mark.parametrize("name", [r"re:.*layers\.3\..*", "re:model.layers.(3|4).mlp", "+:.*layers.[3-5].mlp"])
def test_a_pattern_with_the_number_of_a_block_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="names by number"):
        of_blocks([name])
