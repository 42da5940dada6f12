"""Checking that an architecture, cut into blocks, still is the same model.

From a config alone a tiny random model of the same architecture is made: as narrow as the architecture
allows, with the few consecutive blocks that show each kind of block it has. It is stored, loaded uncut by
transformers, and loaded again in stages, cut at every boundary, exactly as servers and clients load theirs.
Both must give the same logits, and the same gradients by the backward pass that servers run.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from swarmkit._version import __version__
from swarmkit.errors import ModelError, UsageError
from swarmkit.models import loading
from swarmkit.models.architecture import anatomy, quirks
from swarmkit.models.architecture.anatomy import anatomy_of, cache_argument, skeleton_of, slice_config
from swarmkit.models.architecture.quirks import family_of
from swarmkit.models.architecture.wrapper import text_part
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.fingerprint import recall, remember
from swarmkit.models.checkpoint.open_files import open_files
from swarmkit.models.execution import full_sequences, stage, view
from swarmkit.models.execution.full_sequences import FullSequencePass, FullSequences
from swarmkit.models.execution.stage import Stage, StageCache
from swarmkit.models.foreign_errors import disk_trouble, reason_of
from swarmkit.models.head import head
from swarmkit.models.head.head import build_head, load_local
from swarmkit.models.kv import cache, contiguous, state_history
from swarmkit.models.loading import loader

TOLERANCE = 1e-4
"""The largest difference that counts as equal, relative to the largest value. A correct cut differs by the
rounding of float32, some 1e-6; all wrong ones seen so far differ by more than 1e-2."""

_BESIDE_THE_POINT = ("_name_or_path", "transformers_version")
_BLOCKS_AT_A_TIME = 2
"""Servers run backward passes in pieces, between which they run what is more urgent; so does a check."""
_DECISIVE = (anatomy, cache, contiguous, full_sequences, head, loading, quirks, stage, state_history, view)
"""Modules that a verdict depends on: it is found anew when one of them has changed."""
_LONGEST = 8
_VOCABULARY = 61
_PROMPT = 9
_STEPS = 6
_LARGEST_NUMEL = 50_000_000

_Narrower: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        model_type: the architecture.
        agrees: whether every cut equals the uncut model.
        cuts: number of ways to cut it that were tried.
        worst_prefill, worst_decode, worst_backward: the largest difference, relative to the largest value.
        reason: one sentence that says what is wrong; empty if it agrees.
        seconds: duration of the check.
    """

    model_type: str
    agrees: bool
    cuts: int
    worst_prefill: float
    worst_decode: float
    worst_backward: float
    reason: str
    seconds: float = 0.0


def config_of(model: str, *, revision: str | None = None, token: str | None = None) -> PreTrainedConfig:
    """Return the config that `model` names: what `Checkpoint.open` takes, a config file, or a model type.

    Raises:
        ModelError: there is no such thing.
    """
    path = Path(model).expanduser()
    file: Path | None = None
    if path.is_file():
        file = path
    elif path.exists() or model not in CONFIG_MAPPING:
        file = open_files(model, revision=revision, token=token, progress=False).find("config.json")
        assert file is not None, "open_files has found it"
    try:
        content = {"model_type": model} if file is None else json.loads(file.read_text(encoding="utf-8"))
        config: PreTrainedConfig = AutoConfig.for_model(**content)
    except Exception as error:
        raise ModelError(
            f"{file or model} is not a config that transformers can use: {reason_of(error)}"
        ) from error
    return text_part(config)


def ensure_servable(config: PreTrainedConfig) -> Verdict:
    """Check an architecture, unless this machine has done so before with the same code.

    Raises:
        ModelError: it is refused, or a cut model is not the same as the uncut one.
        UsageError: the tiny model cannot be written to this machine's disk.
    """
    family_of(config.model_type)
    with _CHECKING:
        # Most starts find it under the config itself, so that no small model need be made.
        own = f"check:{_identity(config)}"
        verdict = _recalled(own)
        if verdict is None:
            tiny, key = _shrunk_once(config)
            verdict = _recalled(key)
            if verdict is None:
                verdict = compare_cuts(tiny)
                remember(key, asdict(verdict))
            remember(own, asdict(verdict))
    if not verdict.agrees:
        raise ModelError(
            f"{config.model_type!r} models cannot be served by this version: {verdict.reason}. "
            f"`swarmkit check {config.model_type}` shows it; docs/models.md lists what works."
        )
    return verdict


def _recalled(key: str) -> Verdict | None:
    try:
        return Verdict(**recall(key))
    except TypeError:  # there is none, or another version of this code wrote it
        return None


def _shrunk_once(config: PreTrainedConfig) -> tuple[PreTrainedConfig, str]:
    """Return `shrink(config)` and the name under which its verdict is remembered."""
    asked = f"{type(config)} {family_of(config.model_type)!r} {json.dumps(config.to_dict(), default=str)}"
    if asked not in SHRUNK:
        tiny = shrink(config)
        SHRUNK[asked] = tiny, f"check:{_identity(tiny)}"
    return SHRUNK[asked]


SHRUNK: dict[str, tuple[PreTrainedConfig, str]] = {}
"""What `shrink` made of each config in this process, as it makes a model to see that its config works."""

_CHECKING = threading.Lock()
"""Held while checking: several servers in one process need the verdict once."""


def check_architecture(config: PreTrainedConfig) -> Verdict:
    """Make a tiny model like `config`, cut it at every boundary, and compare, which takes seconds.

    The state of the random generators is unchanged afterwards.
    """
    try:
        family_of(config.model_type)
        tiny = shrink(config)
    except ModelError as error:
        return _disagrees(config.model_type, str(error))
    return compare_cuts(tiny)


def _disagrees(model_type: str, reason: str) -> Verdict:
    return Verdict(model_type, False, 0, float("inf"), float("inf"), float("inf"), reason)


def _identity(config: PreTrainedConfig) -> str:
    """Return a hash of all that the verdict on a config depends on."""
    values = {name: value for name, value in config.to_dict().items() if name not in _BESIDE_THE_POINT}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    versions = (__version__, transformers.__version__, torch.__version__)
    for part in (*versions, repr(type(config)), repr(family_of(config.model_type))):
        digest.update(f"\0{part}".encode())
    for module in (*_DECISIVE, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------- a tiny model


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a config of the same architecture, as small as possible, that still shows each kind of block.

    Raises:
        ModelError: no small model of this architecture could be made.
    """
    if not _is_known(config):
        raise ModelError(f"transformers knows no architecture {config.model_type!r}")
    problems: list[Exception] = []
    for narrower in (_narrow, _narrow_keeping_heads, _few_experts, dict):
        found = _shrunk(config, narrower)
        if isinstance(found, PreTrainedConfig):
            return found
        problems.append(found)
    first = problems[0]
    raise ModelError(
        f"no small {config.model_type!r} model could be made to try a cut on "
        f"({type(first).__name__}: {' '.join(str(first).split())[:300]})"
    )


def _is_known(config: PreTrainedConfig) -> bool:
    known = config.model_type in CONFIG_MAPPING and CONFIG_MAPPING[config.model_type] is type(config)
    # Comparing with all of them imports them all: two seconds, so only when that can change the answer.
    return known or type(config) in CONFIG_MAPPING.values()


def _shrunk(config: PreTrainedConfig, narrower: _Narrower) -> PreTrainedConfig | Exception:
    """Make a config small in one way; returns the error if that is no model of the architecture."""
    try:
        values = narrower(config.to_dict() | _no_words(config))
        tiny = _some_blocks(type(config).from_dict(values))
        causal = skeleton_of(anatomy_of(tiny).causal_class, tiny)
        if sum(parameter.numel() for parameter in causal.parameters()) > _LARGEST_NUMEL:
            return ModelError("it cannot be made narrow enough to be tried")
        # Only a model that runs shows that the numbers fit each other.
        with _undisturbed():
            whole: Any = AutoModelForCausalLM.from_config(copy.deepcopy(tiny))
            whole(input_ids=torch.ones(1, 3, dtype=torch.long))
    except Exception as error:  # noqa: BLE001 - whatever transformers raises, another way may do
        return error
    return tiny


def _no_words(config: PreTrainedConfig) -> dict[str, Any]:
    real = config.attribute_map
    few = {real.get("vocab_size", "vocab_size"): _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1}
    return few | {"eos_token_id": 2, "quantization_config": None, "torch_dtype": None, "dtype": None}


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_AT_MOST: Mapping[str, int] = {
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "window_size": 6,
    "floor_scale": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": _VOCABULARY,
}


def _few_experts(values: dict[str, Any]) -> dict[str, Any]:
    """Make experts fewer and windows shorter, which few other numbers depend on."""
    return values | {
        name: min(value, 4 if name in _EXPERTS else _AT_MOST[name])
        for name, value in values.items()
        if _is_count(value) and (name in _EXPERTS or _AT_MOST.get(name, 9) < 7)
    }


def _narrow_keeping_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Make a config narrow, with as many heads as it has."""
    return _narrow(values, heads=None)


def _narrow(values: dict[str, Any], heads: int | None = 4) -> dict[str, Any]:
    """Make a config narrow, with `heads` heads, by the names that configs usually use."""
    # An open value follows from the number of heads.
    values = values | {name: 1 for name in ("head_dim",) if name in values and values[name] is None}
    named = {name: value for name, value in values.items() if _is_count(value)}
    total = next((named[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in named), 4)
    keys = next((named[n] for n in _KEY_HEADS if n in named), total)
    heads = heads or total
    # As in the model itself: all heads have keys of their own, or one set serves all, or something between.
    few = heads if keys == total else 1 if keys == 1 else max(1, heads // 2)
    width = heads * 16
    wide = next((named[n] for n in ("hidden_size", "n_embd", "d_model") if n in named), 0)
    small: dict[str, Any] = {n: few for n in _KEY_HEADS if n in values and values[n] is None}
    for name, value in named.items():
        if name in ("num_attention_heads", "n_head", "n_heads"):
            small[name] = heads
        elif name in _KEY_HEADS:
            small[name] = few
        elif name in ("hidden_size", "n_embd", "d_model"):
            small[name] = width
        elif name == "word_embed_proj_dim":
            small[name] = width if value == wide else width // 2
        elif name in ("head_dim", "attention_head_dim", "query_pre_attn_scalar"):
            small[name] = 16
        elif "intermediate_size" in name or name in ("ffn_dim", "n_inner", "ffn_hidden_size"):
            small[name] = 48
        elif name in _EXPERTS:
            small[name] = min(value, 4)
        elif name in _AT_MOST:
            small[name] = min(value, _AT_MOST[name])
    if "qk_rope_head_dim" in small:
        # Latent attention; its configs calculate these two from others, and write them down as well.
        small["head_dim"] = small["qk_rope_head_dim"]
        small["qk_head_dim"] = small["qk_rope_head_dim"] + small.get("qk_nope_head_dim", 0)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        small["rope_parameters"] = _narrow_rope(rope, small.get("head_dim", 16))
    return values | small


def _narrow_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Shorten lists of factors that have one entry per frequency."""
    half = int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
    shorter: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            shorter[name] = _narrow_rope(value, head_dim)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            shorter[name] = value[:half]
    return rope | shorter


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _some_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """Cut to the first consecutive blocks, at least four if there are, that have every kind of block."""
    kinds = _kinds(config)
    total = len(kinds)
    for length in range(min(4, total), min(_LONGEST, total) + 1):
        for start in range(total - length + 1):
            if set(kinds[start : start + length]) == set(kinds):
                cut = slice_config(config, start, start + length)
                if _kinds(cut) != kinds[start : start + length]:
                    raise ModelError(
                        f"its config says by index what a block is like, so that blocks [{start}, "
                        f"{start + length}) of it cannot be described alone"
                    )
                return cut
    # More kinds than a tiny model can have: those at the beginning, where kinds usually change.
    return slice_config(config, 0, min(_LONGEST, total))


def _kinds(config: PreTrainedConfig) -> list[str]:
    """Describe each block by its parameters, modules and entries in lists that have one per block."""
    found = anatomy_of(config)
    blocks: Any = skeleton_of(found.base_class, config).get_submodule(found.layers)
    lists = [
        value
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == len(blocks)
    ]
    return [
        repr([(name, tuple(p.shape)) for name, p in block.named_parameters()])
        + repr([(name, type(part).__name__) for name, part in block.named_modules()])
        + repr([value[index] for value in lists])
        for index, block in enumerate(blocks)
    ]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep random numbers that are used inside from having an effect outside."""
    with loader(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def _store(config: PreTrainedConfig, folder: str) -> None:
    """Write a random checkpoint."""
    with _undisturbed():
        # A copy, because saving writes into the config.
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        for parameter in model.parameters():
            # Untrained weights are so even that many a mistake would hardly show.
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.tie_weights()
        model.save_pretrained(folder)


# ---------------------------------------------------------------------- comparing


@dataclass
class _Results:
    """The outputs of a model, uncut or cut, for the same inputs."""

    prefill: list[Tensor]
    decode: list[Tensor]
    gradient: Tensor | None = None


class _Chain(nn.Module):
    """The blocks of a head: the stages of one cut, in this process, and one session of them."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.stages = stages
        self.caches: list[StageCache] = []
        self.inputs: list[Tensor] = []
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None

    def start(self) -> None:
        self.caches = [stage.new_cache(stage.start, stage.stop) for stage in self.stages]

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        mask: Tensor | None = given.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.positions = given.get("position_ids")
        self.inputs = []
        for stage, cache in zip(self.stages, self.caches, strict=True):  # noqa: F402
            self.inputs.append(hidden.clone())
            options = {"attention_mask": self.mask, "position_ids": self.positions}
            hidden = stage.forward(hidden, cache, **options)
        return hidden.clone()

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient with respect to what the first block was given in the last call of `forward`.

        Computed as servers compute it: over full sequences, a few blocks at a time.
        """
        for stage, given in reversed(list(zip(self.stages, self.inputs, strict=True))):  # noqa: F402
            options: dict[str, Any] = {"attention_mask": self.mask, "position_ids": self.positions}
            run = FullSequencePass(stage, FullSequences(given, stage.start, stage.stop, **options), grad)
            while run.left:
                run.advance(_BLOCKS_AT_A_TIME)
            grad = run.result()
        return grad


def compare_cuts(tiny: PreTrainedConfig) -> Verdict:
    """Compare every cut of a tiny model with the uncut one."""
    started = time.monotonic()
    cuts = 0
    worst = [0.0, 0.0, 0.0]
    reason = ""
    where = "the uncut model"
    folder = ""
    try:
        with tempfile.TemporaryDirectory(prefix="swarmkit-check-") as folder:
            _store(tiny, folder)
            checkpoint = Checkpoint.open(folder, progress=False)
            local = load_local(checkpoint)
            wanted, grad_wanted, grad_given = _run_local(local, tiny)
            total = checkpoint.num_blocks
            for ends in _ways_to_cut(total):
                where = "cut into blocks " + ", ".join(f"{a}:{b}" for a, b in ends)
                stages = [Stage.load(checkpoint, low, high) for low, high in ends]
                chain = _Chain(stages)
                model = build_head(checkpoint, chain)
                found = _run(model, chain.start)
                found.gradient = _gradient_of(chain, model, grad_given)
                differences = (
                    _difference(found.prefill, wanted.prefill),
                    _difference(found.decode, wanted.decode),
                    _difference([found.gradient], [grad_wanted]),
                )
                cuts += 1
                worst = [max(pair) for pair in zip(worst, differences, strict=True)]
                for what, by in zip(("prefill", "decoding", "the backward pass"), differences, strict=True):
                    if not by <= TOLERANCE and not reason:
                        reason = f"{where}, it differs in {what}, by {by:.1e} of the largest value"
    except Exception as error:
        if (trouble := disk_trouble(error)) is not None:
            raise UsageError(
                "the architecture has to be tried once with a tiny model, which could not be written to "
                f"this machine's folder for temporary files: {trouble}. Make room there, or set TMPDIR to "
                "another folder"
            ) from error
        # Model code may raise anything, and all of it means that the model does not work like this.
        said = reason_of(error).replace(folder, "the tiny checkpoint")[:300]
        reason = f"{where}, it fails: {type(error).__name__}: {said}"
        worst = [float("inf")] * 3 if not cuts else worst
    seconds = round(time.monotonic() - started, 2)
    prefill, decode, backward = worst
    return Verdict(tiny.model_type, not reason, cuts, prefill, decode, backward, reason, seconds)


def _ways_to_cut(total: int) -> list[list[tuple[int, int]]]:
    """One stage, two stages for every boundary, and every block alone."""
    alone = [(block, block + 1) for block in range(total)]
    pairs = [[(0, boundary), (boundary, total)] for boundary in range(1, total)]
    return [[(0, total)], *pairs, *([alone] if total > 2 else [])]


def _prompts() -> Iterator[tuple[Tensor, Tensor | None]]:
    """A batch without and a batch with padding on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, _VOCABULARY, (2, _PROMPT), generator=generator)
    yield ids, None
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    yield ids * mask, mask


def _run(model: Any, start: Callable[[], None]) -> _Results:
    """Run prefill and decode steps with tokens that are always the same, so that one difference stays one."""
    results = _Results([], [])
    generator = torch.Generator().manual_seed(6)
    steps = torch.randint(3, _VOCABULARY, (2, _STEPS), generator=generator)
    for ids, mask in _prompts():
        start()
        cache = DynamicCache(config=model.config)
        past, step = 0, ids
        for number in range(_STEPS + 1):
            length = past + step.shape[1]
            positions = torch.arange(past, length)[None].expand(2, -1)
            if mask is not None:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
            with torch.no_grad():
                out = model(
                    input_ids=step,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    **{cache_argument(type(model)): cache},
                ).logits.float()
            if mask is not None:
                # Outputs at padding mean nothing.
                out = out * mask[:, past:, None]
            (results.decode if number else results.prefill).append(out)
            past, step = length, steps[:, number : number + 1]
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return results


def _run_local(local: Any, config: PreTrainedConfig) -> tuple[_Results, Tensor, Tensor]:
    """Return the uncut model's results, the gradient at its first block, and that given at its last."""
    found = anatomy_of(config)
    blocks: Any = local.get_submodule(found.prefix).get_submodule(found.layers)
    seen: dict[str, Tensor] = {}

    def entering(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        name = found.arguments[0]
        hidden = (args[0] if args else kwargs[name]).detach().requires_grad_()
        seen["in"] = hidden
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {name: hidden})

    def leaving(module: nn.Module, args: Any, out: Any) -> None:
        seen["out"] = out[0] if isinstance(out, tuple) else out

    results = _run(local, lambda: None)
    hooks = [
        blocks[0].register_forward_pre_hook(entering, with_kwargs=True),
        blocks[-1].register_forward_hook(leaving),
    ]
    ids, _ = next(_prompts())
    with torch.enable_grad():
        local(input_ids=ids, use_cache=False)
        given = torch.randn(seen["out"].shape, generator=torch.Generator().manual_seed(7))
        (gradient,) = torch.autograd.grad(seen["out"], seen["in"], given)
    for hook in hooks:
        hook.remove()
    return results, gradient, given


def _gradient_of(chain: _Chain, model: Any, given: Tensor) -> Tensor:
    ids, _ = next(_prompts())
    chain.start()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return chain.gradient(given)


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value; infinite if a value is not a number."""
    by = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    return by if by == by else float("inf")
