"""Write the pictures of README and notebooks anew, from a swarm at work: `make pictures`."""

from __future__ import annotations

import io
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from swarmkit import LocalSwarm
from swarmkit.client.pictures import server_pictures
from swarmkit.drawing.pipeline import pipeline_svg
from swarmkit.drawing.pipeline_log import PipelineLog
from swarmkit.drawing.svg import on_card
from swarmkit.drawing.timeline import timeline_svg
from swarmkit.drawing.training import training_svg
from swarmkit.drawing.values import TrainingPicture
from swarmkit.events import MicroBatchFinished
from swarmkit.net.emulation.link_schedule import EmulatedLink
from tools.tray_pictures import write_tray_pictures

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

_QUESTION = "Tell me a story about a fox."
_TRAINING_STEPS = 40
_FRAMES = 45
_FRAME_MS = 150
_WIDTH, _HEIGHT = 1200, 800


def main() -> None:
    """Let a swarm answer, kill a server in the middle, and keep what people see then."""
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", num_stages=2, replicas=2) as swarm:
        draw(swarm)
    with LocalSwarm("tiny-chat", num_stages=2, replicas=2) as swarm:
        train(swarm)
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        print("no Chromium here: the pictures of playground and tray stay as they are")
        return
    far = EmulatedLink(delay_s=0.015)  # so that an answer takes some seconds, as over the Internet
    with LocalSwarm("tiny-chat", num_stages=2, replicas=2, link=far) as swarm:
        photograph(swarm, path)
    write_tray_pictures(path)


def draw(swarm: LocalSwarm) -> None:
    """Draw a pipeline with a replaced server, and the steps of its session."""
    log = PipelineLog()
    model, tokenizer = swarm.model(), swarm.tokenizer()
    inputs: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with model.subscribe() as events, model.session():
        tokens = model.generate(**inputs, max_new_tokens=12)
        used = model.trace[-1].hops[0].peer_id
        next(server for server in swarm.servers if server.peer_id == used).kill()
        # The session goes on where it was, over the server that takes the place of the killed one.
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20)
    for event in events.pending():
        log.add(event)
    servers = server_pictures(model.connection.client.known.servers())
    shown = log.picture("tiny-chat", swarm.checkpoint.num_blocks, servers, time.time(), is_last=True)
    (IMAGES / "pipeline.svg").write_text(on_card(pipeline_svg(shown)) + "\n")
    (IMAGES / "timeline.svg").write_text(on_card(timeline_svg(log.steps()[-16:])) + "\n")
    print("wrote pipeline.svg and timeline.svg")


def train(swarm: LocalSwarm) -> None:
    """Draw a training: eight vectors before a question learn to be answered with one word."""
    model, tokenizer = swarm.model(), swarm.tokenizer()
    words = model.get_input_embeddings()
    question = tokenizer("What colour has the sky?", return_tensors="pt")["input_ids"]
    answer = tokenizer(" blue", return_tensors="pt", add_special_tokens=False)["input_ids"]
    prompt = torch.nn.Parameter(torch.randn(1, 8, model.config.hidden_size) * 0.02)
    optimizer = torch.optim.Adam([prompt], lr=0.05)
    ids = torch.cat([question, answer], dim=1).expand(4, -1)
    labels = torch.full((4, 8 + ids.shape[1]), -100)
    labels[:, -answer.shape[1] :] = answer
    losses, shares, lost = [], Counter[str](), 0
    with model.subscribe(4096, MicroBatchFinished) as events:
        for step in range(_TRAINING_STEPS):
            if step == _TRAINING_STEPS // 2:
                next(server for server in swarm.servers if server.alive).kill()
            embeddings = torch.cat([prompt.expand(4, -1, -1), words(ids).detach()], dim=1)
            loss = model(inputs_embeds=embeddings, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            done = [event for event in events.pending() if isinstance(event, MicroBatchFinished)]
            shares.update(label for event in done for label in event.route)
            lost += sum(event.lost for event in done)
    shown = TrainingPicture(losses, shares=dict(shares), lost=lost)
    (IMAGES / "training.svg").write_text(on_card(training_svg(shown)) + "\n")
    print("wrote training.svg")


def photograph(swarm: LocalSwarm, chromium: str) -> None:
    """Take pictures of the playground while it answers and loses a server."""
    from PIL import Image
    from playwright.sync_api import sync_playwright
    from swarmkit_app.playground import Playground

    model = swarm.model()
    with Playground([model], swarm) as playground, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        page.goto(playground.url)
        box = page.get_by_role("textbox", name="Message")
        box.fill(_QUESTION)
        frames = []
        for number in range(_FRAMES):
            if number == 2:
                page.get_by_role("button", name="Send").click()
            if number == 14:
                used = model.trace[-1].hops[0].peer_id
                number_used = [server.peer_id for server in swarm.servers].index(used)
                page.get_by_role("combobox", name="Server").click()
                page.get_by_role("option", name=f"server-{number_used} ").click()
                page.get_by_role("button", name="Kill this server").click()
            frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB").resize((900, 600)))
        frames[0].save(
            IMAGES / "playground.webp",
            save_all=True,
            append_images=frames[1:],
            duration=_FRAME_MS,
            loop=0,
            quality=60,
            method=6,
        )
        page.wait_for_timeout(1500)
        page.screenshot(path=str(IMAGES / "playground.png"))
        page.emulate_media(color_scheme="dark")
        page.reload()
        page.get_by_role("tab", name="Swarm").click()
        page.wait_for_timeout(1500)
        page.screenshot(path=str(IMAGES / "swarm-dark.png"))
        browser.close()
    print("wrote playground.png, playground.webp and swarm-dark.png")


if __name__ == "__main__":
    main()
