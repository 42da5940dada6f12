"""Run the benchmarks that the README quotes and write their results to benchmarks/results/.

    python benchmarks/run.py            all of them
    python benchmarks/run.py decode     those whose name begins so

Every result is the command's own JSON: date, machine, versions, command, numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

COMMANDS = {
    "decode-tiny-chat": ["bench", "decode", "--stages", "1,2,4", "--rounds", "9", "--json"],
    "decode-random-llama": [
        *("bench", "decode", "--stages", "1,2,4", "--random-llama"),
        *("--tokens", "32", "--rounds", "5", "--json"),
    ],
    "failover-tiny-chat": ["bench", "failover", "--trials", "10", "--json"],
}


def main() -> int:
    """Returns the number of benchmarks that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMMANDS))
    wanted = tuple(parser.parse_args().names)
    chosen = {name: command for name, command in COMMANDS.items() if not wanted or name.startswith(wanted)}
    if not chosen:
        parser.error(f"no benchmark begins with {', '.join(wanted)}; there are {', '.join(COMMANDS)}")
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for name, command in chosen.items():
        print(f"{name}: swarmkit {' '.join(command)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "swarmkit.cli", *command], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            failed += 1
            print(f"  failed with exit code {done.returncode}")
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"  {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
