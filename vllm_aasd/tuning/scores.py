"""How good an answer is, from 0 to 1, by the kind of its task."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm_aasd.tuning.statistics import lcs_length, num_copied, rouge_l

COPIED_SPAN = 8


class Answer(NamedTuple):
    """What scores look at.

    Attributes:
        prompt, token_ids, first: token ids of the prompt, of the answer, and of the first method's answer.
        text: the answer.
        reference: of the task.
    """

    prompt: Sequence[int]
    token_ids: Sequence[int]
    first: Sequence[int]
    text: str
    reference: str | None


def answer_match(answer: Answer) -> float:
    """1 if the reference stands in the answer: case, punctuation, articles and spaces apart (as in SQuAD)."""
    return float(f" {_normalised(answer.reference)} " in f" {_normalised(answer.text)} ")


def last_number(answer: Answer) -> float:
    """1 if the last number of the answer is that of the reference (as in GSM8K)."""
    ours, theirs = (_numbers(text) for text in (answer.text, answer.reference))
    return float(bool(ours and theirs) and ours[-1] == theirs[-1])


def next_line(answer: Answer) -> float:
    """Edit similarity of the reference and the answer's first line of code (as in LongBench)."""
    lines = answer.text.lstrip("\n").split("\n")
    code = (line for line in lines if line.strip() and "`" not in line and "#" not in line)
    return similarity(next(code, lines[0]), answer.reference)


def edit_similarity(answer: Answer) -> float:
    """Edit similarity of the answer and as much of the reference."""
    return similarity(answer.text, answer.reference[: len(answer.text)])


def copied(answer: Answer) -> float:
    """Share of the answer's tokens in runs of at least `COPIED_SPAN` that the prompt holds."""
    return num_copied(answer.token_ids, answer.prompt, COPIED_SPAN) / max(len(answer.token_ids), 1)


def rouge_l_to_first(answer: Answer) -> float:
    """ROUGE-L F1 over tokens to the first method's answer."""
    return rouge_l(answer.token_ids, answer.first)


SCORES: dict[str, Callable[[Answer], float]] = {
    "answer": answer_match,
    "last_number": last_number,
    "next_line": next_line,
    "edit_similarity": edit_similarity,
    "copied": copied,
    "rouge_l": rouge_l_to_first,
}
"""By the name that a task has it under."""


def score(kind: str | None, tokenizer: Any, **parts: Any) -> float | None:
    """Score an answer; None for a task without a score.

    Args:
        kind: of `SCORES`.
        tokenizer: of transformers.
        **parts: of an `Answer`, without its text.
    """
    if kind is None:
        return None
    text = tokenizer.decode(parts["token_ids"], skip_special_tokens=True)
    return round(SCORES[kind](Answer(text=text, **parts)), 4)


def similarity(one: str, other: str) -> float:
    """Edit similarity by insertions and deletions, 1 for equal texts: a hundredth of rapidfuzz's ratio."""
    if not one and not other:
        return 1.0
    codes = [[ord(char) for char in text] for text in (one, other)]
    return 2 * lcs_length(*codes) / (len(one) + len(other))


def _normalised(text: str) -> str:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]
