"""How fast is a swarm beside llama.cpp, and beside its RPC servers, with the same weights?

    python benchmarks/beside_llama_cpp.py --json > benchmarks/results/beside-llama-cpp.json    (8 minutes)

llama.cpp comes from the package llama-cpp-python, built from source for this machine, with its RPC backend:

    CMAKE_ARGS="-DGGML_RPC=ON" pip install --no-binary llama-cpp-python llama-cpp-python gguf safetensors

`--python` names the interpreter of the environment where that was done; this one, if not given.

Random Llamas S and M are written once as a checkpoint and once as a GGUF file, in float32. Four systems
answer the same prompts, in turns, round by round; each round has prompts of its own, and the first one does
not count. Every process computes with one thread.

    transformers     the local model; several clients are the rows of one batch
    swarmkit         a swarm of server processes on loopback; several clients are threads of one process
    llama.cpp        in one process; several clients are sequences of one batch
    llama.cpp RPC    the same with its blocks on RPC servers, as many as the swarm has

With `--compiled SESSIONS` the swarm's servers decode so many sessions at once through compiled steps
(`SWARMKIT_SERVER_COMPILE`), and measuring starts when these are in place, which takes minutes the first time.

All answers have to be equal, token for token: otherwise the benchmark fails. Reported, as medians over
rounds: tokens per second after the first one (with several clients, of all together, with their prompts), or
the seconds to the first token of a long prompt; and the ratios of swarmkit's speed to the others', medians of
the ratios within rounds. Above 1 swarmkit is faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swarmkit.bench.environment import environment
from swarmkit.bench.measure import PATIENT, timed_generate
from swarmkit.bench.subject import Subject, open_subject
from swarmkit.cli.console import quiet_transformers
from swarmkit.local.server_process import ServerProcess
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.settings import EngineSettings, ServerSettings

CHILD = Path(__file__).with_name("llama_cpp_process.py")
OURS = "swarmkit"
END_OF_TEXT = 2
"""No answer may end early."""
_PATIENCE_S = 60.0
_COMPILING_S = 900.0


@dataclass(frozen=True)
class Case:
    """So many clients, each with a prompt of so many tokens and an answer of so many."""

    model: str
    servers: int
    clients: int
    prompt_tokens: int
    tokens: int

    @property
    def name(self) -> str:
        if self.tokens == 1:
            return f"{self.model}, first token of {self.prompt_tokens:,}, {self.servers} servers"
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        return f"{self.model}, {clients}, {self.servers} servers"


CASES = (
    Case("S", 2, 1, 16, 128),
    Case("M", 2, 1, 16, 32),
    Case("M", 2, 8, 16, 16),
    Case("M", 2, 1, 1024, 1),
    Case("M", 4, 1, 16, 32),
)


@dataclass(frozen=True)
class Answered:
    """What one system answered to all prompts at once, and when."""

    answers: list[list[int]]
    first_s: float
    total_s: float

    def speed(self, case: Case) -> float:
        """Tokens per second; of a first token, its prompt's."""
        if case.tokens == 1:
            return case.prompt_tokens / self.first_s
        if case.clients == 1:
            return (case.tokens - 1) / (self.total_s - self.first_s)
        return case.clients * case.tokens / self.total_s


class Transformers:
    """The local model, with all prompts as the rows of one batch."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, prompts: torch.Tensor, tokens: int) -> Answered:
        """Answer prompts `[clients, tokens]`."""
        got = timed_generate(self._model, prompts, tokens)
        new = got.tokens[:, prompts.shape[1] :]
        return Answered(new.tolist(), got.first_token_s, got.total_s)


class Swarm:
    """A model of a swarm, with a thread for each prompt."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, prompts: torch.Tensor, tokens: int) -> Answered:
        """Answer prompts `[clients, tokens]`."""

        def one(row: torch.Tensor) -> Any:
            torch.set_num_threads(1)
            return timed_generate(self._model, row[None], tokens, collects=False)

        gc.collect()
        with ThreadPoolExecutor(len(prompts)) as threads:
            began = time.perf_counter()
            got = list(threads.map(one, prompts))
        ended = max(each.stamps[-1] for each in got)
        first = min(each.stamps[1] for each in got)
        if len(got) == 1:
            began = got[0].began
        new = [each.tokens[0, prompts.shape[1] :].tolist() for each in got]
        return Answered(new, first - began, ended - began)


class LlamaCpp:
    """A process of `llama_cpp_process.py` that answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def answer(self, prompts: torch.Tensor, tokens: int) -> Answered:
        """Answer prompts `[clients, tokens]`."""
        asked = {"prompts": prompts.tolist(), "tokens": tokens, "never": END_OF_TEXT}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Answered(**json.loads(_line(self._process)))


def _line(process: subprocess.Popen[str]) -> str:
    """The next line that a process says.

    Raises:
        RuntimeError: it ended.
    """
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise RuntimeError("a process of llama.cpp ended; what it said is above")
    return line


@contextmanager
def _child(python: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process of llama.cpp, which ends with the block."""
    command = [python, str(CHILD), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def llama_cpp(python: str, file: Path, case: Case, servers: int) -> Iterator[LlamaCpp]:
    """llama.cpp with so many RPC servers; none: it computes by itself."""
    with ExitStack() as owned:
        ports = [_free_port() for _ in range(servers)]
        for port in ports:
            owned.enter_context(_child(python, "serve", port))
        for port in ports:
            _wait_for(port)
        length = case.prompt_tokens + case.tokens
        process = owned.enter_context(_child(python, "answer", file, case.clients, length, *ports))
        _line(process)  # it is ready
        yield LlamaCpp(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(port: int) -> None:
    """Wait until somebody listens there.

    Raises:
        TimeoutError: nobody does within a minute.
    """
    until = time.monotonic() + _PATIENCE_S
    while not _listens(port):
        if time.monotonic() > until:
            raise TimeoutError("an RPC server of llama.cpp did not start; what it said is above")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def measure(case: Case, systems: dict[str, Any], vocab_size: int, rounds: int) -> dict[str, Any]:
    """One row: all systems by turns, on the same prompts.

    Raises:
        AssertionError: two of them answer differently.
    """
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    first_s: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        seed = torch.Generator().manual_seed(number)
        prompts = torch.randint(3, vocab_size, (case.clients, case.prompt_tokens), generator=seed)
        found = {name: system.answer(prompts, case.tokens) for name, system in systems.items()}
        expected = next(iter(found.values())).answers
        for name, answered in found.items():
            if answered.answers != expected:
                raise AssertionError(f"{case.name}: {name} gives other tokens than {next(iter(found))}")
            if number:
                speeds[name].append(answered.speed(case))
                first_s[name].append(answered.first_s)
        print(f"{case.name}: round {number} of {rounds}", file=sys.stderr)
    return row(case, speeds, first_s)


def row(case: Case, speeds: dict[str, list[float]], first_s: dict[str, list[float]]) -> dict[str, Any]:
    """The medians over rounds, and how many times as fast as each of the others swarmkit is."""
    figures = first_s if case.tokens == 1 else speeds
    return {
        "name": case.name,
        "model": case.model,
        "servers": case.servers,
        "clients": case.clients,
        "prompt_tokens": case.prompt_tokens,
        "tokens": case.tokens,
        "unit": "seconds" if case.tokens == 1 else "tokens/s",
        "found": {name: round(statistics.median(values), 3) for name, values in figures.items()},
        "times_as_fast_as": {
            name: round(statistics.median(a / b for a, b in zip(speeds[OURS], values, strict=True)), 3)
            for name, values in speeds.items()
            if name != OURS
        },
    }


def run(cases: Sequence[Case], python: str, rounds: int, compiled: int) -> list[dict[str, Any]]:
    """The rows of all cases. Cases with the same model and number of servers share a swarm.

    Args:
        compiled: how many sessions servers decode at once through compiled steps; 0 = none.
    """
    rows = []
    for model in dict.fromkeys(case.model for case in cases):
        with open_subject(model) as subject, TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            subprocess.run([python, CHILD, "convert", subject.checkpoint.name, file], check=True)
            local = load_local(subject.checkpoint, dtype="float32")
            for servers in dict.fromkeys(case.servers for case in cases if case.model == model):
                alike = [case for case in cases if (case.model, case.servers) == (model, servers)]
                rows += _over(subject, local, file, alike, python, rounds, compiled)
    return rows


def _over(
    subject: Subject,
    local: Any,
    file: Path,
    cases: Sequence[Case],
    python: str,
    rounds: int,
    compiled: int,
) -> list[dict[str, Any]]:
    """The rows of cases with the same model and number of servers."""
    with_steps = EngineSettings(compile="on", compile_slots=compiled) if compiled else EngineSettings()
    with LocalSwarm(
        subject.checkpoint,
        num_stages=cases[0].servers,
        processes=True,
        threads=1,
        dtype="float32",
        server_settings=ServerSettings(engine=with_steps),
        client_settings=PATIENT,
    ) as swarm:
        if compiled:
            _wait_for_compiled(swarm, compiled)
        model = swarm.model(dtype="float32")
        rows = []
        for case in cases:
            with (
                llama_cpp(python, file, case, 0) as alone,
                llama_cpp(python, file, case, case.servers) as over_rpc,
            ):
                systems = {
                    "transformers": Transformers(local),
                    OURS: Swarm(model),
                    "llama.cpp": alone,
                    "llama.cpp RPC": over_rpc,
                }
                rows.append(measure(case, systems, subject.vocab_size, rounds))
    return rows


def _wait_for_compiled(swarm: LocalSwarm, sessions: int) -> None:
    """Wait until every server decodes so many sessions at once through compiled steps.

    Raises:
        RuntimeError: one of them cannot.
    """
    for server in swarm.servers:
        assert isinstance(server, ServerProcess)
        while True:
            told = server.wait_for("step_compiled", "step_not_compiled", timeout=_COMPILING_S)
            if told["event"] == "step_not_compiled":
                raise RuntimeError(f"{server.public_name}: {told['reason']}")
            print(f"{server.public_name}: {told['rows']} rows, {told['speedup']:.2f}", file=sys.stderr)
            if told["rows"] == sessions:
                break


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compiled", type=int, default=0, metavar="SESSIONS", help="0 = no compiled steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    cases = [case for case in CASES if options.only in case.name]
    rows = run(cases, options.python, options.rounds, options.compiled)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    found = subprocess.run([options.python, "-c", version], capture_output=True, text=True, check=True)
    about = environment()
    result = {
        "benchmark": "beside_llama_cpp",
        **about,
        "command": " ".join(["python benchmarks/beside_llama_cpp.py", *sys.argv[1:]]).replace(
            options.python, "PYTHON"
        ),
        "versions": {**about["versions"], "llama_cpp_python": found.stdout.strip()},
        "rounds": options.rounds,
        "compiled_sessions": options.compiled,
        "threads": 1,
        "dtype": "float32",
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return 0
    others = list(rows[0]["times_as_fast_as"])
    systems = list(rows[0]["found"])
    table = Table("", "unit", *systems, *(f"÷ {name}" for name in others))
    for each in rows:
        table.add_row(
            each["name"],
            each["unit"],
            *(f"{each['found'][name]:.3g}" for name in systems),
            *(f"{each['times_as_fast_as'][name]:.2f}" for name in others),
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
