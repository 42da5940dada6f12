"""The shipped model ``tiny-chat``: its checkpoint, and questions that measure it.

The checkpoint is a folder in Hugging Face format. Nothing here needs a deep-learning library; the weights are
only a path::

    from swarmkit.tinychat import CHECKPOINT, held_out
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
"""

from pathlib import Path
from typing import Final

from swarmkit.tinychat.questions import Question, accuracy, held_out, trained_questions
from swarmkit.tinychat.review import reviews

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
"""The folder with ``config.json``, ``model.safetensors``, the tokenizer and the model card."""

__all__ = ["CHECKPOINT", "Question", "accuracy", "held_out", "reviews", "trained_questions"]
