"""What a serving process imports: each import is a wait for everybody who starts one."""

from __future__ import annotations

import json
import subprocess
import sys

SERVING = """
import json, sys
import swarmkit.cli.serve, swarmkit.node.server, swarmkit.client.model
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.hivemind.table import load_hivemind
load_hivemind()
import transformers.models.llama.modeling_llama
print(json.dumps(sorted(sys.modules)))
"""
NOT_NEEDED = {
    "IPython",
    "anywidget",
    "bitsandbytes",
    "datasets",
    "fastapi",
    "gradio",
    "jsonschema",
    "matplotlib",
    "pandas",
    "peft",
    "sklearn",
    "swarmkit.api",
    "swarmkit.bench.soak",
    "swarmkit.client.adapters.peft",
    "swarmkit.local",
    "swarmkit.notebook",
    "swarmkit.simulation",
    "swarmkit.worker",
    "torchvision",
    "transformers.pipelines",
    "transformers.trainer",
    "uvicorn",
}


def test_a_server_and_a_client_import_nothing_that_only_others_need() -> None:
    run = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True, check=True)
    assert NOT_NEEDED & set(json.loads(run.stdout.splitlines()[-1])) == set()
