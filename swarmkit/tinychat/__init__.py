"""The shipped model ``tiny-chat``: its checkpoint, and the little invented world it was taught.

Here live the checkpoint folder in Hugging Face format, the generator that writes its training dialogues, and
the held-out questions that measure it. Everything is pure standard library; the weights are only a path::

    from swarmkit.tinychat import CHECKPOINT, held_out
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
"""

from pathlib import Path
from typing import Final

from swarmkit.tinychat.pool import Question
from swarmkit.tinychat.review import reviews
from swarmkit.tinychat.world import accuracy, dialogues, held_out

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
"""The folder with ``config.json``, ``model.safetensors``, the tokenizer and the model card."""

__all__ = ["CHECKPOINT", "Question", "accuracy", "dialogues", "held_out", "reviews"]
