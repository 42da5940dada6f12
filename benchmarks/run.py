"""Run the benchmarks that the README quotes and write their results to benchmarks/results/, with a plot.

    python benchmarks/run.py                    all of them
    python benchmarks/run.py decode clients-m   those whose name begins so
    python benchmarks/run.py --plot             none: draw the plot of the results that are there

Every result is the command's own JSON: date, machine, versions, command, numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from plots import draw, goals

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLOT = RESULTS / "engine.svg"

SCRIPTS = {
    "machine": "machine.py",  # not a benchmark of ours, but what the others are to be read beside
    "few-rows": "few_rows.py --json",
    "views": "views.py --json",
    "beside-llama-cpp": "beside_llama_cpp.py --json",
    "compiled-step-s": "compiled_step.py --model S --json",
    "compiled-step-m": "compiled_step.py --model M --sessions 1,2 --json",
}
"""Files beside this one; they print their result as one JSON value."""
COMMANDS = {
    "machine": "",
    "few-rows": "",
    "views": "",
    "beside-llama-cpp": "",
    "compiled-step-s": "",
    "compiled-step-m": "",
    "decode-tiny-chat": "decode --stages 1,2,4 --rounds 9",
    "decode-s": "decode --model S --stages 1,2,4 --rounds 9",
    "decode-m": "decode --model M --stages 1,2,4 --tokens 32",
    "decode-l-bfloat16-cuda": "decode --model L --stages 1,2 --rounds 3 --dtype bfloat16 --device cuda",
    "decode-l-nf4-cuda": "decode --model L --stages 1,2 --rounds 3 --dtype nf4 --device cuda",
    "clients-s": "clients --model S",
    "clients-m": "clients --model M",
    "prefill-m": "prefill --model M --stages 2,4 --prompt-tokens 1024",
    "second-turn-m": "second-turn --model M --history-tokens 2048",
    "interference-m": "interference --model M --prefill-tokens 4096 --rounds 2",
    "distance-m": "distance --model M --stages 3 --round-trip-ms 100 --megabits 100 --tokens 64 "
    "--prompt-lookup 15 --draft-blocks 4",
    "codecs-tiny-chat": "codecs --questions 200",
    "codecs-m": "codecs --model M --questions 8 --prompt-tokens 64 --tokens 12 --megabits 10",
    "faults-s": "faults --model S --probability 0.001 --tokens 1024",
    "recovery-s": "recovery --model S --tokens 256",
    "recovery-m": "recovery --model M --tokens 32",
    "footprint-m": "footprint --model M --blocks 8",
    "train-m": "train --model M --batch 8 --tokens 128 --replicas 1,2,4 --rounds 3",
    "failover-tiny-chat": "failover --trials 10",
    "handover-m": "handover --model M --history 256,1024,2048",
    "weights-random-llama": "weights",
    "soak-tiny-chat": "soak --minutes 15 --clients 16",
}


def main() -> int:
    """Returns the number of benchmarks that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMMANDS))
    parser.add_argument("--plot", action="store_true", help="only draw the results that are there")
    arguments = parser.parse_args()
    wanted = tuple(arguments.names)
    chosen = {name: command for name, command in COMMANDS.items() if not wanted or name.startswith(wanted)}
    if not torch.cuda.is_available():
        chosen = {name: command for name, command in chosen.items() if not name.endswith("-cuda")}
    if find_spec("ipykernel") is None:
        chosen.pop("views", None)  # it measures in a notebook's kernel
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        chosen.pop("beside-llama-cpp", None)  # they are no dependency of anything else
    if not chosen:
        parser.error(f"no benchmark begins with {', '.join(wanted)}; there are {', '.join(COMMANDS)}")
    RESULTS.mkdir(exist_ok=True)
    failed = 0 if arguments.plot else sum(not _run(name, command) for name, command in chosen.items())
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    if rows := goals(found):
        PLOT.write_text(draw(rows))
        print(f"  {_shown(PLOT)}")
    return failed


def _run(name: str, command: str) -> bool:
    """Run one benchmark and keep its result; whether it succeeded."""
    if name in SCRIPTS:
        print(f"{name}: python benchmarks/{SCRIPTS[name]}", flush=True)
        script, *options = SCRIPTS[name].split()
        program = [str(HERE / script), *options]
    else:
        print(f"{name}: swarmkit bench {command} --json", flush=True)
        program = ["-m", "swarmkit.cli", "bench", *command.split(), "--json"]
    done = subprocess.run([sys.executable, *program], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"  failed with exit code {done.returncode}")
        return False
    result = json.loads(done.stdout if name in SCRIPTS else done.stdout.strip().splitlines()[-1])
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"  {_shown(path)}")
    return True


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
