"""Write the pictures of README and notebooks anew, from a swarm at work: `make pictures`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from swarmkit import LocalSwarm
from swarmkit.client.pictures import server_pictures
from swarmkit.drawing.pipeline import pipeline_svg
from swarmkit.drawing.pipeline_log import PipelineLog
from swarmkit.drawing.svg import on_card
from swarmkit.drawing.timeline import timeline_svg

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

_QUESTION = [{"role": "user", "content": "Tell me a story about a fox."}]


def main() -> None:
    """Let a swarm answer, kill a server in the middle, and draw what a live view shows then."""
    torch.set_num_threads(1)
    log = PipelineLog()
    with LocalSwarm("tiny-chat", num_stages=2, replicas=2) as swarm:
        model, tokenizer = swarm.model(), swarm.tokenizer()
        inputs: Any = tokenizer.apply_chat_template(
            _QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with model.subscribe() as events, model.session():
            tokens = model.generate(**inputs, max_new_tokens=12)
            used = model.trace[-1].hops[0].peer_id
            next(server for server in swarm.servers if server.peer_id == used).kill()
            # The session goes on where it was, over the server that takes the place of the killed one.
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20)
        for event in events.pending():
            log.add(event)
        servers = server_pictures(model.connection.client.servers())
        shown = log.picture("tiny-chat", swarm.checkpoint.num_blocks, servers, time.time(), is_last=True)
    (IMAGES / "pipeline.svg").write_text(on_card(pipeline_svg(shown)) + "\n")
    (IMAGES / "timeline.svg").write_text(on_card(timeline_svg(log.steps()[-16:])) + "\n")
    print(f"wrote {IMAGES / 'pipeline.svg'} and timeline.svg")


if __name__ == "__main__":
    main()
