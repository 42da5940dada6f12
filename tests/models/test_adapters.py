"""Adapters in a stage's blocks: equal to PEFT's, side by side, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swarmkit.errors import AdapterError
from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Fittings, Lora
from swarmkit.models.adapters.files import CONFIG, WEIGHTS, SavedAdapter
from swarmkit.models.architecture.anatomy import anatomy_of
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StageCache, StepPart
from swarmkit.models.head.head import build_head, load_local

from .tiny import StageChain, make_checkpoint
from .tuned import peft_model, random_adapter, saved_adapter

pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 33, 17, 4, 41, 8, 12]])


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))


@pytest.fixture(scope="module")
def stage(checkpoint: Checkpoint) -> Stage:
    return Stage.load(checkpoint, 0, 4)


def hidden(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, checkpoint: Checkpoint) -> SavedAdapter:
    return SavedAdapter.open(folder, anatomy_of(checkpoint.config))


# ---------------------------------------------------------------------- as PEFT computes it

KINDS: dict[str, tuple[str, list[str] | str, dict[str, Any]]] = {
    "llama": ("llama", ["q_proj", "v_proj", "o_proj", "down_proj"], {}),
    "patterns": (
        "llama",
        "all-linear",
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.*.v_proj": 3}},
    ),
    "rslora": ("llama", ["k_proj", "gate_proj"], {"use_rslora": True, "layers_to_transform": [1, 2]}),
    "conv1d": ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "experts": ("mixtral", ["q_proj", "o_proj"], {}),
    "gemma2": ("gemma2", ["q_proj", "k_proj", "v_proj", "o_proj"], {}),
}


def some_slowly(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.slow if kind in ("experts", "gemma2") else ())


@pytest.mark.parametrize("kind", map(some_slowly, KINDS))
def test_a_saved_adapter_gives_the_logits_of_peft(tmp_path: Path, checkpoints: Path, kind: str) -> None:
    model_type, targets, changes = KINDS[kind]
    checkpoint = Checkpoint.open(make_checkpoint(checkpoints, model_type, num_blocks=3))
    reference = peft_model(checkpoint, targets, **changes)
    reference.save_pretrained(tmp_path)
    saved = opened(tmp_path, checkpoint)
    stages = [Stage.load(checkpoint, 0, 1), Stage.load(checkpoint, 1, 3)]
    chain = StageChain(stages)
    chain.caches = [
        stage.new_cache(stage.start, stage.stop, saved.read(stage.fittings, stage.start, stage.stop))
        for stage in stages
    ]
    head: Any = build_head(checkpoint, chain)
    with torch.no_grad():
        found, wanted = head(IDS).logits, reference(IDS).logits
        with reference.disable_adapter():
            without = reference(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - without).abs().max() > 0.01


# ---------------------------------------------------------------------- deep prompts


class Prompted(nn.Module):
    """The whole model on this machine; hooks add a prompt to the first inputs of each block."""

    def __init__(self, checkpoint: Checkpoint, prompts: Tensor) -> None:
        super().__init__()
        self.model: Any = load_local(checkpoint)
        self.prompts = prompts
        for block, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(self._hook(block), with_kwargs=True)

    def _hook(self, block: int) -> Callable[..., Any]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            prompt = self.prompts[block]
            first = args[0][:, : len(prompt)] + prompt
            return (torch.cat([first, args[0][:, len(prompt) :]], dim=1), *args[1:]), kwargs

        return add

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids).logits
        return logits


@pytest.mark.parametrize("cuts", [[8], [2, 6], [1, 1, 1, 5]], ids=str)
def test_deep_prompts_act_at_their_positions_however_a_prompt_is_cut(
    checkpoint: Checkpoint, stage: Stage, cuts: list[int]
) -> None:
    adapter = random_adapter(stage.fittings, 0, 4, modules=(), prompt_tokens=3)
    prompts = torch.stack([adapter.tensors.prompts[block] for block in range(4)])
    wanted = Prompted(checkpoint, prompts)(IDS)
    local: Any = load_local(checkpoint)
    inputs = local.model.embed_tokens(IDS)
    cache = stage.new_cache(0, 4, adapter)
    out = torch.cat([stage.forward(piece, cache) for piece in inputs.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(local.lm_head(local.model.norm(out)), wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- side by side


def test_sessions_with_different_adapters_run_together_as_each_would_alone(stage: Stage) -> None:
    one = random_adapter(stage.fittings, 0, 4, seed=1)
    other = random_adapter(stage.fittings, 0, 4, ("mlp.down_proj", "self_attn.o_proj"), 5, 2, seed=2)
    whose = [one, None, other, one, other]
    shapes = [(1, 5), (1, 3), (2, 4), (1, 1), (1, 1)]
    caches = [stage.new_cache(0, 4, adapter) for adapter in whose]
    twins = [stage.new_cache(0, 4, adapter) for adapter in whose]
    for step in range(3):
        given = [hidden(rows, tokens, 10 * step + n) for n, (rows, tokens) in enumerate(shapes)]
        together = stage.forward_many([StepPart(h, c) for h, c in zip(given, caches, strict=True)])
        for n, part in enumerate(together):
            assert isinstance(part, Tensor), part
            torch.testing.assert_close(part, stage.forward(given[n], twins[n]), atol=1e-5, rtol=1e-5)
        shapes = [(rows, 1) for rows, _ in shapes]


def test_who_has_no_adapter_is_not_touched_by_those_who_have(stage: Stage) -> None:
    given = [hidden(1, 1, seed) for seed in range(4)]

    def of_the_third(adapters: list[Adapter | None]) -> Tensor:
        caches = [stage.new_cache(0, 4, adapter) for adapter in adapters]
        found = stage.forward_many([StepPart(h, c) for h, c in zip(given, caches, strict=True)])[2]
        assert isinstance(found, Tensor)
        return found

    adapter = random_adapter(stage.fittings, 0, 4, prompt_tokens=2)
    assert torch.equal(of_the_third([adapter, adapter, None, None]), of_the_third([None] * 4))


def test_nothing_of_an_adapter_stays_behind(stage: Stage) -> None:
    before = stage.forward(hidden(1, 4), stage.new_cache(0, 4))
    tuned = stage.forward(hidden(1, 4), stage.new_cache(0, 4, random_adapter(stage.fittings, 0, 4)))
    assert not torch.equal(tuned, before)
    assert torch.equal(stage.forward(hidden(1, 4), stage.new_cache(0, 4)), before)


# ---------------------------------------------------------------------- the form


def test_a_part_of_an_adapter_is_a_part_of_its_values(stage: Stage) -> None:
    whole = random_adapter(stage.fittings, 0, 4, prompt_tokens=2)
    part = whole.within(1, 3)
    assert part.values.data_ptr() != whole.values.data_ptr()
    assert part.values.untyped_storage().data_ptr() == whole.values.untyped_storage().data_ptr()
    for place, tensors in part.tensors.lora.items():
        assert torch.equal(tensors[0], whole.tensors.lora[place][0])
    assert torch.equal(part.tensors.prompts[2], whole.tensors.prompts[2])


def test_a_digest_names_form_and_values(stage: Stage) -> None:
    adapter = random_adapter(stage.fittings, 0, 4)
    spec, values = adapter.spec, adapter.values
    louder = AdapterSpec(0, 4, tuple(one._replace(scale=1.0) for one in spec.lora))
    others = [values * 2, values.bfloat16()]
    digests = {adapter.digest, Adapter(louder, values, stage.fittings).digest}
    digests |= {Adapter(spec, other, stage.fittings).digest for other in others}
    assert len(digests) == 4
    assert Adapter(spec, values.clone(), stage.fittings).digest == adapter.digest


# ---------------------------------------------------------------------- what does not fit


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(AdapterError) as caught:
        work()
    return str(caught.value)


def test_parts_without_a_place_are_refused_by_name(stage: Stage, checkpoints: Path) -> None:
    fits = stage.fittings

    def of(*lora: Lora) -> Callable[[], object]:
        return lambda: fits.check(AdapterSpec(0, 4, lora), max_rank=16)

    assert "another model" in refusal(of(Lora(1, "attn.c_attn", 4, 1.0)))
    assert "another model" in refusal(of(Lora(1, "input_layernorm", 4, 1.0)))
    assert "rank 17, more than the 16" in refusal(of(Lora(1, "self_attn.q_proj", 17, 1.0)))
    assert "rank 0" in refusal(of(Lora(1, "self_attn.q_proj", 0, 1.0)))
    assert "outside 0:4" in refusal(of(Lora(4, "self_attn.q_proj", 4, 1.0)))
    assert "sorted" in refusal(of(*[Lora(1, "self_attn.q_proj", 4, 1.0)] * 2))
    latent = Checkpoint.open(make_checkpoint(checkpoints, "deepseek_v3", num_blocks=3))
    cached = AdapterSpec(0, 1, (Lora(0, "self_attn.kv_b_proj", 4, 1.0),))
    assert "cached" in refusal(lambda: Stage.load(latent, 0, 1).fittings.check(cached))


def test_values_of_another_number_or_kind_are_refused(stage: Stage) -> None:
    adapter = random_adapter(stage.fittings, 0, 4)
    spec, values = adapter.spec, adapter.values
    assert "floating values" in refusal(lambda: Adapter(spec, values[1:], stage.fittings))
    assert "floating values" in refusal(lambda: Adapter(spec, values.long(), stage.fittings))


def test_an_adapter_of_other_blocks_is_refused(stage: Stage) -> None:
    adapter = random_adapter(stage.fittings, 1, 3)
    assert "blocks 1:3, not 0:4" in refusal(lambda: stage.new_cache(0, 4, adapter))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, checkpoints: Path, stage: Stage) -> None:
    wider = Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4, seed=3, hidden_size=64))
    saved = opened(saved_adapter(tmp_path, wider, ["q_proj"]), wider)
    assert "another model" in refusal(lambda: saved.read(stage.fittings, 0, 4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
    ids=str,
)
def test_adapters_of_other_kinds_are_refused_by_name(
    tmp_path: Path, checkpoint: Checkpoint, changes: dict[str, Any], named: str
) -> None:
    folder = saved_adapter(tmp_path, checkpoint, ["q_proj"])
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    assert named in refusal(lambda: opened(folder, checkpoint))


def test_saved_values_that_are_no_numbers_are_refused(
    tmp_path: Path, checkpoint: Checkpoint, stage: Stage
) -> None:
    folder = saved_adapter(tmp_path, checkpoint, ["q_proj"])
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    assert "NaN" in refusal(lambda: opened(folder, checkpoint).read(stage.fittings, 0, 4))


def test_files_that_are_missing_or_malformed_are_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert CONFIG in refusal(lambda: opened(tmp_path, checkpoint))
    folder = saved_adapter(tmp_path, checkpoint, ["q_proj"])
    (folder / WEIGHTS).write_bytes(b"junk")
    assert WEIGHTS in refusal(lambda: opened(folder, checkpoint))


def test_blocks_have_linear_layers_on_the_meta_device_too(checkpoint: Checkpoint, stage: Stage) -> None:
    with torch.device("meta"):
        skeleton = anatomy_of(checkpoint.config).base_class(checkpoint.config)
    blocks = dict(enumerate(skeleton.layers))
    assert Fittings.of(blocks, 32).linears == stage.fittings.linears


def test_a_cache_keeps_its_adapter_when_it_begins_anew(stage: Stage) -> None:
    adapter = random_adapter(stage.fittings, 0, 4)
    cache: StageCache = stage.new_cache(0, 4, adapter)
    first = stage.forward(hidden(1, 4), cache)
    cache.clear()
    assert torch.equal(stage.forward(hidden(1, 4), cache), first)
