"""Questions: reading a file in Spec-Bench's format, choosing some of each category, and tokenising them."""

import pathlib
from typing import Any

from vllm_aasd.tuning.json_lines import DataError, read_lines
from vllm_aasd.tuning.spec_bench import Question, parse_question

GROUPS = ("summarization", "rag", "qa", "math_reasoning", "mt_bench")
"""The categories that a mean is taken over."""


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


def choose(questions: list[Question], groups: tuple[str, ...], limit: int) -> list[Question]:
    """The first questions of each group, from its categories in turn where it has several.

    Args:
        questions: to choose from.
        groups: wanted, in the order of the result.
        limit: at most so many of each group.

    Raises:
        DataError: for a group that has none.
    """
    chosen = []
    for group in groups:
        places: dict[str, int] = {}
        ranked = []
        for question in questions:
            if question.group == group:
                place = places.get(question.category, 0)
                places[question.category] = place + 1
                ranked.append((place, question))
        if not ranked:
            known = ", ".join(sorted({question.group for question in questions}))
            raise DataError(f"no question of category {group!r}; there are: {known}")
        ranked.sort(key=lambda pair: pair[0])
        chosen += [question for _, question in ranked[:limit]]
    return chosen


def chat_token_ids(model: str, texts: list[str], max_length: int) -> list[list[int]]:
    """Each text as the user's first message, through the model's chat template.

    Raises:
        DataError: if one takes more than ``max_length`` tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) > max_length:
            raise DataError(f"{len(prompt)} tokens, and {max_length} are allowed: {text[:60]!r} ...")
    return prompts
