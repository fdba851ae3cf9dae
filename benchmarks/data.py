"""Questions: reading a file in Spec-Bench's format."""

import pathlib
from typing import Any

from vllm_aasd.tuning.json_lines import DataError, read_lines
from vllm_aasd.tuning.spec_bench import Question, parse_question


def read_questions(path: pathlib.Path) -> list[Question]:
    """Read questions in Spec-Bench's format, one JSON object a line.

    Each has ``question_id`` (int or str), ``category`` (str) and ``turns`` (a list of str, not empty);
    ``reference`` (a list of str, one per turn) is taken where it is one, and anything else is left alone.
    Empty lines are passed over.

    Raises:
        DataError: for a line that isn't so, for an id that comes twice, and for a file without questions.
    """
    questions: dict[int | str, Question] = {}

    def keep(value: dict[str, Any]) -> None:
        question = parse_question(value)
        if question.question_id in questions:
            raise ValueError(f"question_id {question.question_id!r} stands on an earlier line already")
        questions[question.question_id] = question

    read_lines(path, keep)
    if not questions:
        raise DataError(f"{path}: no questions in it")
    return list(questions.values())
