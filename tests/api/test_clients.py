"""Clients that people use, each against the server over HTTP.

`make test-all` installs those that are not here (the extra `clients`). A test whose client is not there is
skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from swarmkit import LocalSwarm
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from tests.api.chats import ADD, openai_tool, with_tools
from tests.api.worlds import STORY, Api, api_of

STORY_TEXT = STORY[0]["content"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    checkpoint = with_tools(tmp_path_factory.mktemp("tools"))
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm, api_of(swarm) as api:
        yield api


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is sent to anybody but the server under test."""
    for name, value in {
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LANGSMITH_TRACING": "false",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LLM_USER_PATH": str(tmp_path / "llm"),
        "DO_NOT_TRACK": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def story(api: Api) -> str:
    """What the official client gets."""
    with api.openai() as client:
        found = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    return found.choices[0].message.content or ""


# Python


@slow
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(api: Api, story: str, provider: str) -> None:
    litellm = pytest.importorskip("litellm")
    base = f"{api.url}/v1" if provider == "openai" else api.url
    options = {"model": f"{provider}/tiny-chat", "messages": STORY, "api_base": base, "max_tokens": 400}
    assert litellm.completion(**options).choices[0].message.content == story
    chunks = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == story


@slow
def test_langchain_openai(api: Api, story: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="tiny-chat", base_url=f"{api.url}/v1", api_key="none")
    assert chat.invoke(STORY_TEXT).content == story
    assert "".join(chunk.content for chunk in chat.stream(STORY_TEXT)) == story
    [call] = chat.bind_tools([openai_tool(ADD)], tool_choice="add").invoke("Add.").tool_calls
    assert (call["name"], sorted(call["args"])) == ("add", ["a", "b"])


@slow
def test_llm(api: Api, story: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    folder = tmp_path / "llm"
    folder.mkdir()
    model = {"model_id": "tiny", "model_name": "tiny-chat", "api_base": f"{api.url}/v1", "api_key_name": "x"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([model]))
    command = [sys.executable, "-m", "llm", "-m", "tiny", "--key", "none", STORY_TEXT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == story.strip()


@slow
def test_openai_agents(api: Api) -> None:
    agents = pytest.importorskip("agents")
    import openai

    called: list[str] = []

    def look(town: str) -> str:
        """Look at a town."""
        called.append(town)
        return "done"

    look.__annotations__["town"] = Literal["Larkhill", "Oakford"]
    tool = agents.function_tool(look)

    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        called.clear()
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none")  # one for each event loop
        agent = agents.Agent(
            name="adder",
            model=kind(model="tiny-chat", openai_client=client),
            tools=[tool],
            tool_use_behavior="stop_on_first_tool",
            model_settings=agents.ModelSettings(tool_choice="required", temperature=0.0),
        )
        assert asyncio.run(agents.Runner.run(agent, "Look at Larkhill.")).final_output == "done"
        assert len(called) == 1


@slow
def test_pydantic_ai(api: Api, story: str) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{api.url}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        assert Agent(kind("tiny-chat", provider=provider)).run_sync(STORY_TEXT).output == story


# evaluation


@slow
def test_lm_eval_scores_a_task_as_the_local_model_does(api: Api, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    sums = [
        {"question": f"What is {a} plus {b}?", "choices": [str(a + b), str(a + b + 1)], "gold": 0}
        for a in range(2, 5)
        for b in range(2, 5)
    ]
    data = tmp_path / "sums.json"
    data.write_text("\n".join(json.dumps(question) for question in sums))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }

    def scores(model: Any) -> Any:
        found = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)
        return [[answer[0][0] for answer in one["resps"]] for one in found["samples"]["sums"]]

    folder = api.swarm.checkpoint.name
    local = load_local(Checkpoint.open(folder))
    wanted = scores(HFLM(pretrained=local, tokenizer=api.swarm.tokenizer(), batch_size=4))
    found = scores(
        LocalCompletionsAPI(
            base_url=f"{api.url}/v1/completions",
            model="tiny-chat",
            tokenizer=folder,
            tokenizer_backend="huggingface",
            batch_size=4,
            num_concurrent=1,
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


# our own description


@slow
@pytest.mark.timeout(600)
def test_schemathesis_finds_no_request_that_makes_the_server_fail(api: Api, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    seconds = os.environ.get("SWARMKIT_SCHEMATHESIS_S", "60")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json"),
        *("--checks", "not_a_server_error", "--max-time", seconds, "--seed", "7"),
        *("--request-timeout", "60", "--generation-database", "none", "--no-color"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# clients in environments of their own


def run_in_venv(folder: Path, packages: list[str], script: str, api: Api) -> str:
    """Install packages into a fresh environment, and run a script there; what it prints."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
    subprocess.run(install, check=True, timeout=500)
    environment = {**os.environ, "URL": api.url, "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


OLD_OPENAI = """\
import os, openai
assert openai.__version__.startswith("2."), openai.__version__
client = openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Tell me a story about a fox."}]
stream = client.chat.completions.create(model="tiny-chat", messages=messages, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
print(client.responses.create(model="tiny-chat", input=messages).output_text)
"""
INSTRUCTOR = """\
import os, instructor, openai
from typing import Literal
from pydantic import BaseModel
class Sum(BaseModel):
    total: Literal[6, 7]
server = openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none")
client = instructor.from_openai(server, mode=instructor.Mode.TOOLS)
messages = [{"role": "user", "content": "What is 3 + 4?"}]
found = client.chat.completions.create(model="tiny-chat", response_model=Sum, messages=messages)
print(found.total in (6, 7))
"""


@slow
@pytest.mark.timeout(600)
def test_openai_of_the_major_version_before(api: Api, story: str, tmp_path: Path) -> None:
    assert run_in_venv(tmp_path / "venv", ["openai>=2,<3"], OLD_OPENAI, api) == f"{story}\n{story}\n"


@slow
@pytest.mark.timeout(600)
def test_instructor(api: Api, tmp_path: Path) -> None:
    assert run_in_venv(tmp_path / "venv", ["instructor"], INSTRUCTOR, api) == "True\n"
