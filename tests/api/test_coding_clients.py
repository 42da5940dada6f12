"""Programs that write code with a model, aider, codex and opencode, with nothing to talk to but our server.

They begin with instructions of some 10,000 tokens and many tools. The chat template here leaves that out, so
that what they show can be compared with what tiny-chat tells the official client. Each is installed into a
folder of its own, and skipped where it cannot be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit import LocalSwarm
from tests.api.chats import FORGETFUL, with_tools
from tests.api.worlds import STORY, Api, api_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ASKED = STORY[0]["content"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    checkpoint = with_tools(tmp_path_factory.mktemp("tools"), FORGETFUL)
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm, api_of(swarm) as api:
        yield api


@pytest.fixture(scope="module")
def story(api: Api) -> str:
    """What the official client is told."""
    with api.openai() as client:
        found = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    return found.choices[0].message.content or ""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a program has its settings, and the folder that it works in."""
    (tmp_path / "work").mkdir()
    return tmp_path


def run(home: Path, command: list[str], **environment: str) -> str:
    """Run a program to its end; what it prints."""
    quiet = {
        "HOME": str(home),
        "PWD": str(home / "work"),
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        **environment,
    }
    done = subprocess.run(
        command,
        cwd=home / "work",
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def requests(api: Api) -> dict[str, int]:
    """How often each status was answered so far, of all endpoints that make answers."""
    with api.http() as http:
        text = http.get("/metrics").text
    found: dict[str, int] = {}
    for status, count in re.findall(r'_requests_total\{endpoint="/v1/[crm].*?",status="(\d+)"\} (\d+)', text):
        found[status] = found.get(status, 0) + int(count)
    return found


def answered_since(api: Api, before: dict[str, int]) -> int:
    """How many requests were answered since then; none was refused, and none has failed."""
    now = requests(api)
    assert {status for status in now if now[status] != before.get(status, 0)} == {"200"}
    return now["200"] - before.get("200", 0)


def test_aider_asks(api: Api, home: Path) -> None:
    python = str(home / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True, timeout=120)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "aider-chat"]
    if subprocess.run(install, timeout=600, capture_output=True, check=False).returncode:
        pytest.skip("pip cannot install aider-chat")
    options = (
        "--no-git --yes-always --analytics-disable --no-check-update --no-show-model-warnings --no-pretty "
        "--no-show-release-notes --no-detect-urls --map-tokens 0 --chat-mode ask"
    )
    server = ["--model", "openai/tiny-chat", "--openai-api-base", f"{api.url}/v1", "--openai-api-key", "none"]
    before = requests(api)
    told = run(
        home,
        [python, "-m", "aider", *options.split(), *server, "--message", ASKED],
        PYTHONPATH="",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert re.search(r"Tokens: \d+ sent, \d+ received", told), told
    assert answered_since(api, before) == 1


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with codex and opencode in it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    made = tmp_path_factory.mktemp("npm")
    (made / "package.json").write_text("{}")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "@openai/codex", "opencode-ai"]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install the packages: {done.stderr.strip()[-200:]}")
    return made / "node_modules"


CODEX = """\
model = "tiny-chat"
model_provider = "swarm"
web_search = "disabled"
check_for_update_on_startup = false
[model_providers.swarm]
name = "swarm"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
"""


def test_codex_asks_with_all_its_tools(api: Api, programs: Path, home: Path, story: str) -> None:
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(CODEX.format(url=api.url))
    command = [str(programs / ".bin" / "codex"), "exec", "--skip-git-repo-check", "--json", "-s", "read-only"]
    before = requests(api)
    told = [
        json.loads(line) for line in run(home, [*command, ASKED]).splitlines() if line.startswith('{"type"')
    ]
    [answer] = [each["item"]["text"] for each in told if each.get("item", {}).get("type") == "agent_message"]
    assert answer.split() == story.split()
    assert told[-1]["type"] == "turn.completed"
    assert answered_since(api, before) >= 1


def test_opencode_asks_with_all_its_tools(api: Api, programs: Path, home: Path) -> None:
    found = sorted(programs.glob("opencode-*/bin/opencode"))
    if not found:
        pytest.skip("opencode has no program for this machine")
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{api.url}/v1", "apiKey": "none"},
        "models": {"tiny-chat": {"limit": {"context": 60_000, "output": 400}}},
    }
    names = dict.fromkeys(("model", "small_model"), "swarm/tiny-chat")
    off = {"share": "disabled", "autoupdate": False}
    (home / "work" / "opencode.json").write_text(
        json.dumps({"provider": {"swarm": provider}, **names, **off})
    )
    before = requests(api)
    told = run(home, [str(found[0]), "run", ASKED], OPENCODE_DISABLE_MODELS_FETCH="1")
    assert "met a fox" in told  # a whole story, and another one: its request is not the official client's
    assert told.strip().endswith("The end.")
    assert answered_since(api, before) >= 1
