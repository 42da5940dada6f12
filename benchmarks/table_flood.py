"""What does a peer pay that is sent ten thousand records of 3.7 KB to keep?

    python -m benchmarks.table_flood --json > benchmarks/results/table-flood.json

A peer in a process of its own keeps records for others, as every server does. A stranger signs so many
announcements, each of another block, and stores them there in requests as large as one may be.

Reported:

    taken              how many records the peer said that it keeps, at first
    table_records      how many it keeps at the end
    table_mib          what the table counts for them
    memory_mib         by how much its process has grown
    processor_s        what the flood has cost it
    longest_turn_s     processor time of the longest turn of its event loop
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from swarmkit.bench.environment import environment
from tests.net.table_flooding import measure


def row(records: int) -> dict[str, Any]:
    """The figures of a flood of so many records."""
    found = measure(records)
    return {
        "records": found["records"],
        "taken": found["taken"],
        "table_records": found["table_records"],
        "table_mib": round(found["table_bytes"] / 2**20, 1),
        "memory_mib": round(found["memory_bytes"] / 2**20, 1),
        "processor_s": round(found["processor_s"], 1),
        "longest_turn_s": round(found["longest_turn_s"], 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    given = parser.parse_args()
    found = row(given.records)
    if given.json:
        command = "python -m benchmarks.table_flood " + " ".join(sys.argv[1:])
        result = {**environment(), "command": command, "benchmark": "table flood", "rows": [found]}
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(f"{name:16} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
