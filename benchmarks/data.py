"""Questions: reading a file in Spec-Bench's format, choosing some of each category, and tokenising them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

GROUPS = ("summarization", "rag", "qa", "math_reasoning", "mt_bench")
"""The categories that a mean is taken over."""

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


class DataError(ValueError):
    """A line of a data file isn't as it should be; the text names the file, the line and what is wrong."""


class Question(NamedTuple):
    """One line of a data file.

    Attributes:
        question_id: as the file has it.
        category: as the file has it.
        group: the category that it counts under; the eight of MT-bench count as ``mt_bench``.
        text: the first turn.
        reference: the file's answer to it, where there is one.
    """

    question_id: int | str
    category: str
    group: str
    text: str
    reference: str | None = None


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


def read_lines(path: pathlib.Path, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand each line's JSON object on; empty lines are passed over.

    Args:
        path: of the file.
        keep: called with each object; may raise ValueError.

    Raises:
        DataError: for a line that isn't an object, or that ``keep`` refuses.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError(f"an object is wanted, and this is {type(value).__name__}")
                keep(value)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None


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


def parse_question(value: dict[str, Any]) -> Question:
    """Check one object in Spec-Bench's format.

    Raises:
        ValueError: if it isn't so.
    """
    for key, types, what in (
        ("question_id", (int, str), "an integer or a string"),
        ("category", (str,), "a string"),
        ("turns", (list,), "a list of strings"),
    ):
        if key not in value:
            raise ValueError(f"{key!r} is missing")
        if not isinstance(value[key], types) or isinstance(value[key], bool):
            raise ValueError(f"{key!r} must be {what}, and is {value[key]!r}")
    turns = value["turns"]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"'turns' must hold at least one string, and no empty one; it is {turns!r}")
    category = value["category"]
    group = "mt_bench" if category in _MT_BENCH else category
    references = value.get("reference")
    known = isinstance(references, list) and references and isinstance(references[0], str)
    return Question(value["question_id"], category, group, turns[0], references[0] if known else None)
