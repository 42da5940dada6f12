"""Clients from npm, installed into a folder of their own; skipped where there is no npm or no registry."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit import LocalSwarm
from tests.api.chats import with_tools
from tests.api.worlds import STORY, Api, api_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PACKAGES = ("openai", "ai", "@ai-sdk/openai-compatible", "compatcanary")
OFFICIAL = """\
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me a story about a fox." }];
const plain = await client.chat.completions.create({ model: "tiny-chat", messages });
let text = "";
const stream = await client.chat.completions.create({ model: "tiny-chat", messages, stream: true });
for await (const chunk of stream)
  text += chunk.choices[0].delta.content ?? "";
const response = await client.responses.create({ model: "tiny-chat", input: messages });
const texts = [plain.choices[0].message.content, text, response.output_text];
console.log(JSON.stringify(texts));
"""
AI_SDK = """\
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool, jsonSchema } from "ai";
const baseURL = process.env.URL + "/v1";
const provider = createOpenAICompatible({ name: "swarmkit", baseURL, apiKey: "none" });
const model = provider("tiny-chat");
const prompt = "Tell me a story about a fox.";
const plain = await generateText({ model, prompt });
let text = "";
for await (const piece of streamText({ model, prompt }).textStream) text += piece;
const properties = { town: { enum: ["Larkhill", "Oakford"] } };
const schema = { type: "object", properties, required: ["town"] };
const look = tool({ description: "Look.", inputSchema: jsonSchema(schema) });
const called = await generateText({ model, prompt, tools: { look }, toolChoice: "required" });
console.log(JSON.stringify([plain.text, text, called.toolCalls[0].toolName]));
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    checkpoint = with_tools(tmp_path_factory.mktemp("tools"))
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm, api_of(swarm) as api:
        yield api


@pytest.fixture(scope="module")
def story(api: Api) -> str:
    with api.openai() as client:
        found = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    return found.choices[0].message.content or ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages in it."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("npm and Node.js are not installed")
    made = tmp_path_factory.mktemp("npm")
    (made / "package.json").write_text('{"type": "module"}')
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", *PACKAGES]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install the packages: {done.stderr.strip()[-200:]}")
    return made


def run(folder: Path, api: Api, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Node.js in the folder, with nothing sent to anybody but the server under test."""
    environment = {**os.environ, "URL": api.url, "DO_NOT_TRACK": "1", "OPENAI_API_KEY": "none"}
    return subprocess.run(
        ["node", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "last"), [(OFFICIAL, None), (AI_SDK, "look")], ids=["openai", "@ai-sdk/openai-compatible"]
)
def test_a_client_gets_the_same_plain_and_streamed(
    api: Api, folder: Path, story: str, script: str, last: str | None
) -> None:
    (folder / "script.js").write_text(script)
    done = run(folder, api, "script.js")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [story, story, last or story]


def test_compatcanary_finds_everything_compatible_that_tiny_chat_can_do(api: Api, folder: Path) -> None:
    tool = "node_modules/compatcanary/src/cli.js"
    done = run(folder, api, tool, "scan", "--base-url", f"{api.url}/v1", "--model", "tiny-chat")
    verdicts = re.findall(r"^(PASS|FAIL|WARN)  (.*?)  ", done.stdout, re.MULTILINE)
    # it wants a call with any string, and so small a model never closes one
    assert {name for verdict, name in verdicts if verdict != "PASS"} <= {"Forced tool call"}
    assert len(verdicts) == 7, done.stdout + done.stderr
