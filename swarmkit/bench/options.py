"""The options of every benchmark, each said once: the commands of `swarmkit bench` are made from them.

A benchmark is measured by `measure` in the module of its name. This file imports none of these modules, so
that `swarmkit bench --help` need not load PyTorch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

from swarmkit.bench.progress import Progress, quiet


def option(default: Any, text: str, **more: Any) -> Any:
    """A field with its help.

    Args: more: `min` and `max` of a number, `flag` for another name than the field's, `short` for a letter.
    """
    return field(default=default, metadata={"help": text, **more})


def _model() -> Any:
    return option(
        "tiny-chat",
        "`S`, `M` or `L` (random Llamas of hidden size 256, 1024 and 4096; L takes 16 GB), `tiny-chat`, "
        "a folder or a repo id.",
        short="-m",
    )


def _threads() -> Any:
    return option(1, "Torch threads of every process.", min=1)


def _dtype() -> Any:
    return option("float32", "The precision: float32, bfloat16, float16, int8 or nf4.")


def _rounds(default: int = 3) -> Any:
    return option(default, "Rounds that count. One more comes before them.", min=1)


def _stages(default: int = 2) -> Any:
    return option(default, "Servers in the chain.", min=1)


def _tokens(default: int) -> Any:
    return option(default, "New tokens per round.", min=4)


def _seed(what: str) -> Any:
    return option(0, f"Decides {what}.")


def _round_trip(default: float) -> Any:
    return option(default, "Round-trip time between any two peers, in milliseconds.", min=0.0)


def _megabits(default: float) -> Any:
    return option(default, "Bandwidth of each server's link in each direction, in Mbit/s.", min=0.001)


@dataclass(frozen=True)
class Benchmark:
    """What all benchmarks have in common. The docstring of each is the help of its command."""

    name: ClassVar[str]
    """The command's name; with underscores, the name of the module that measures."""
    needs_model: ClassVar[bool] = True
    """Whether `measure` is given an opened model."""

    def run(self, on_progress: Progress = quiet) -> dict[str, Any]:
        """Measure, and return the result as JSON values.

        Raises:
            UsageError: the options do not fit the model.
            AssertionError: what was timed is not the same work on both sides.
        """
        measure = importlib.import_module(f"swarmkit.bench.{self.name.replace('-', '_')}").measure
        if not self.needs_model:
            return dict(measure(self, on_progress))
        subject = importlib.import_module("swarmkit.bench.subject")
        model, device = getattr(self, "model", ""), getattr(self, "device", "cpu")
        with subject.open_subject(model, on_progress, device) as opened:
            return {"model": opened.label, **measure(self, opened, on_progress)}

    def values(self, *names: str) -> dict[str, Any]:
        """Return some options by name, as they stand in a result."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Decode(Benchmark):
    """Tokens/s, the ratio to the local model in the same run, and what each hop adds.

    Examples:

        swarmkit bench decode --stages 1,2,4 --json

        swarmkit bench decode --model M --tokens 32

        swarmkit bench decode --model L --stages 1,2 --dtype bfloat16 --device cuda
    """

    name = "decode"

    stages: tuple[int, ...] = option((1, 2, 4), "Lengths of the chain, as in 1,2,4.")
    model: str = _model()
    tokens: int = _tokens(64)
    rounds: int = _rounds(5)
    threads: int = _threads()
    dtype: str = _dtype()
    device: str = option("cpu", "Where to compute: cpu, cuda, cuda:1, mps, …")
    records: bool = option(True, "On an accelerator, decode through CUDA graphs.")


@dataclass(frozen=True)
class Clients(Benchmark):
    """Tokens/s of many clients at once, and the ratio to one.

    Examples:

        swarmkit bench clients --model M --clients 1,8,32 --json
    """

    name = "clients"

    clients: tuple[int, ...] = option((1, 8, 32), "How many clients at once, as in 1,8,32.")
    model: str = _model()
    stages: int = _stages()
    tokens: int = _tokens(32)
    prompt_tokens: int = option(16, "Tokens of each prompt.", min=1)
    rounds: int = _rounds()
    load_processes: int = option(2, "Processes that the clients share.", min=1)
    threads: int = _threads()
    dtype: tuple[str, ...] = option(
        ("float32", "bfloat16"), "One or more precisions, as in float32,bfloat16."
    )


@dataclass(frozen=True)
class Prefill(Benchmark):
    """The wait for the first token of a long prompt, and the ratio to the local model.

    Examples:

        swarmkit bench prefill --model M --prompt-tokens 1024 --json
    """

    name = "prefill"

    stages: tuple[int, ...] = option((2, 4), "Lengths of the chain, as in 2,4.")
    model: str = _model()
    prompt_tokens: int = option(1024, "Tokens of the prompt.", min=1)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class Interference(Benchmark):
    """How long one client's tokens take while another client's long prompt is computed.

    Examples:

        swarmkit bench interference --model M --prefill-tokens 4096 --json
    """

    name = "interference"

    model: str = _model()
    prefill_tokens: int = option(4096, "Tokens of the other client's prompt.", min=1)
    stages: int = _stages()
    tokens: int = _tokens(128)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class Distance(Benchmark):
    """Decode over long links, and the ratio to what their round trips allow.

    Examples:

        swarmkit bench distance --model M --round-trip-ms 100 --megabits 100 --json
    """

    name = "distance"

    model: str = _model()
    round_trip_ms: float = _round_trip(100.0)
    megabits: float = _megabits(100.0)
    stages: int = _stages(3)
    tokens: int = _tokens(32)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()
    prompt_lookup: int = option(
        0,
        "Above 0, also look draft tokens up in the text, this many at most, in a text that repeats itself "
        "and in one that does not.",
        min=0,
    )
    draft_blocks: int = option(0, "Above 0, also have this many of the first blocks draft tokens.", min=0)


@dataclass(frozen=True)
class FaultsBenchmark(Benchmark):
    """Generate while connections break all the time, and the ratio to when none does.

    Examples:

        swarmkit bench faults --model S --probability 0.001 --tokens 1024 --json
    """

    name = "faults"

    model: str = _model()
    probability: float = option(1e-3, "The probability that a send ends its connection.", min=0.0, max=1.0)
    tokens: int = _tokens(1024)
    stages: int = _stages()
    replicas: int = option(2, "Servers of each stage.", min=1)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()
    seed: int = _seed("which sends fail")


@dataclass(frozen=True)
class Failover(Benchmark):
    """The stall from SIGKILL to the next token.

    Examples:

        swarmkit bench failover --json
    """

    name = "failover"

    model: str = _model()
    trials: int = option(5, "Servers to kill.", min=1)
    tokens: int = option(64, "Tokens per answer.", min=16)
    threads: int = _threads()
    seed: int = _seed("which server is killed after which token")


@dataclass(frozen=True)
class SecondTurn(Benchmark):
    """The first token of a chat's second turn, with what servers keep of the first turn and without.

    Examples:

        swarmkit bench second-turn --model M --history-tokens 2048 --json
    """

    name = "second-turn"

    model: str = _model()
    stages: int = _stages()
    history_tokens: int = option(2048, "Tokens of the first turn.", min=16)
    question_tokens: int = option(32, "Tokens of the question in the second turn.", min=1)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class Codecs(Benchmark):
    """What each codec of hidden states saves, and which tokens it changes.

    Examples:

        swarmkit bench codecs --questions 200 --json
    """

    name = "codecs"

    model: str = _model()
    questions: int = option(100, "Questions whose answers are compared.", min=1)
    stages: int = _stages(4)
    round_trip_ms: float = _round_trip(20.0)
    megabits: float = _megabits(2.0)
    prompt_tokens: int = option(128, "Tokens of the prompt of an answer that is timed.", min=1)
    tokens: int = _tokens(24)
    rounds: int = _rounds()
    threads: int = _threads()


@dataclass(frozen=True)
class FootprintBenchmark(Benchmark):
    """One server's processes and memory, and how long it takes until it serves.

    Examples:

        swarmkit bench footprint --model M --blocks 8 --json
    """

    name = "footprint"

    model: str = _model()
    blocks: int = option(8, "Blocks that the server holds.", min=1)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class Weights(Benchmark):
    """What a second server costs the Hub, when the first one gives it its blocks.

    Examples:

        swarmkit bench weights --json
    """

    name = "weights"
    needs_model = False

    blocks: int = option(4, "Blocks that both servers hold.", min=1, max=8)
    hidden_size: int = option(1024, "Width of the random Llama, a multiple of 64.", min=64)
    threads: int = _threads()


@dataclass(frozen=True)
class Soak(Benchmark):
    """Clients that come, go, cancel and are killed; then a count of what the servers still hold.

    Exits with code 1 if anything is left, or an answer was not the local model's.

    Examples:

        swarmkit bench soak --minutes 15 --clients 16 --json
    """

    name = "soak"

    model: str = _model()
    minutes: float = option(15.0, "How long the clients come and go.", min=0.1, max=24.0 * 60)
    clients: int = option(16, "Clients at the same time.", min=1, max=256)
    processes: int = option(4, "Processes that the clients share.", min=1)
    kill_every_s: float = option(
        10.0, "Seconds between two SIGKILLs of a process of clients; 0 = none.", min=0.0, flag="--kill-every"
    )
    threads: int = _threads()
    seed: int = _seed("what each client does when")


@dataclass(frozen=True)
class Train(Benchmark):
    """A training step: forward and forward + backward, as ratios to the local model in the same run.

    Examples:

        swarmkit bench train --model M --batch 8 --tokens 128 --replicas 1,2,4 --json
    """

    name = "train"

    replicas: tuple[int, ...] = option((1,), "Servers of each stage, as in 1,2,4.")
    model: str = _model()
    stages: int = _stages()
    batch: int = option(8, "Sequences in a batch.", min=1)
    tokens: int = option(128, "Tokens of each sequence.", min=2)
    rounds: int = _rounds(5)
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class HandoverBenchmark(Benchmark):
    """A session's stall when its server leaves: keys and values handed over, against a replay.

    Examples:

        swarmkit bench handover --model M --history 256,1024,2048 --json

        swarmkit bench handover --model M --megabits 20
    """

    name = "handover"

    history: tuple[int, ...] = option((256, 1024, 2048), "Tokens that the session holds, as in 256,1024.")
    model: str = _model()
    round_trip_ms: float = _round_trip(20.0)
    megabits: float = _megabits(100.0)
    rounds: int = _rounds()
    threads: int = _threads()
    dtype: str = _dtype()


@dataclass(frozen=True)
class Recovery(Benchmark):
    """Generate with all that recovery needs kept ready, and the ratio to nothing kept.

    Examples:

        swarmkit bench recovery --model S --tokens 256 --json
    """

    name = "recovery"

    model: str = _model()
    tokens: int = _tokens(256)
    stages: int = _stages()
    rounds: int = _rounds(5)
    threads: int = _threads()
    dtype: str = _dtype()


BENCHMARKS: tuple[type[Benchmark], ...] = (
    Decode,
    Clients,
    Prefill,
    Interference,
    Distance,
    FaultsBenchmark,
    Failover,
    HandoverBenchmark,
    SecondTurn,
    Codecs,
    FootprintBenchmark,
    Weights,
    Soak,
    Train,
    Recovery,
)
"""In the order of `swarmkit bench --help`."""
