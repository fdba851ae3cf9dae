"""Questions in Spec-Bench's format."""

from typing import Any, NamedTuple

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


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
