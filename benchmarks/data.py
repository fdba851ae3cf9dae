"""Questions: reading a file in Spec-Bench's format, choosing some of each category, and tokenising them."""

import json
import pathlib
from typing import NamedTuple

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
    """

    question_id: int | str
    category: str
    group: str
    text: str


def read_questions(path: pathlib.Path) -> list[Question]:
    """Read questions in Spec-Bench's format, one JSON object a line.

    Each has ``question_id`` (int or str), ``category`` (str) and ``turns`` (a list of str, not empty);
    anything else, such as ``reference``, is left alone. Empty lines are passed over.

    Raises:
        DataError: for a line that isn't so, for an id that comes twice, and for a file without questions.
    """
    questions: dict[int | str, Question] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                question = _parsed(line)
                if question.question_id in questions:
                    raise ValueError(
                        f"question_id {question.question_id!r} stands on an earlier line already"
                    )
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            questions[question.question_id] = question
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


def _parsed(line: bytes) -> Question:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"an object is wanted, and this is {type(value).__name__}")
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
    return Question(value["question_id"], category, group, turns[0])
