"""Write the questions that come with the package: all held-out ones, and trained ones of a few kinds."""

from __future__ import annotations

import json

from swarmkit.tinychat.questions import FILE, Question
from tools.tinychat.world import held_out, trained_questions

KINDS = ("people", "towns", "animals", "jobs")
LONGEST_ANSWER = 60
"""Characters; a trained question with a longer answer stays out."""


def packaged_questions() -> str:
    """Return the text of the file, a question on each line."""
    trained = [q for q in trained_questions() if q.kind in KINDS and len(q.answer) < LONGEST_ANSWER]
    return f'{{\n"held_out": [\n{_lines(held_out())}\n],\n"trained": [\n{_lines(trained)}\n]\n}}\n'


def _lines(questions: list[Question]) -> str:
    return ",\n".join(
        json.dumps([question.kind, list(question.messages), question.answer], ensure_ascii=False)
        for question in questions
    )


if __name__ == "__main__":
    FILE.write_text(packaged_questions(), encoding="utf-8")
