"""Tasks of any of the data formats, and their choice by category."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm_aasd.tuning.json_lines import DataError, read_lines
from vllm_aasd.tuning.spec_bench import parse_question

_SCORES = {"summarization": "rouge_l", "math_reasoning": "last_number"}


class Task(NamedTuple):
    """What is asked, and how its answer is judged.

    Attributes:
        task_id: unique within its category.
        category: it counts under this one.
        text: the user's message; the last of them where there is a conversation.
        raw: what a model without a chat template is to go on with; None for ``text``.
        score: see `vllm_aasd.tuning.scores.SCORES`; None for no score.
        reference: what the score compares with; None where that is the first method's answer, or nothing.
        conversation: the messages before, each with ``role`` and ``content``.
    """

    task_id: str
    category: str
    text: str
    raw: str | None = None
    score: str | None = None
    reference: str | None = None
    conversation: tuple[Mapping[str, str], ...] = ()


def read_tasks(path: pathlib.Path) -> list[Task]:
    """Read a file with one JSON object a line, in any of three formats.

    - Spec-Bench: ``question_id``, ``category``, ``turns``, perhaps ``reference``;
    - HotpotQA with its passages: ``question``, ``answer``, ``context`` (a list of ``{"title", "text"}``, or
      of ``[title, [sentence, ...]]`` as HotpotQA itself has it), perhaps ``id`` or ``_id``;
    - any: ``prompt``, or ``messages`` as of the OpenAI API (texts only), perhaps ``category`` (by default the file's
      name) and ``reference``, which the answer is to hold.

    Raises:
        DataError: for a line in none of them, for an id that comes twice, and for a file without tasks.
    """
    tasks: dict[tuple[str, str], Task] = {}

    def keep(value: dict[str, Any]) -> None:
        task = _parsed(value, path.stem, len(tasks) + 1)
        if (task.category, task.task_id) in tasks:
            raise ValueError(f"{task.task_id!r} stands on an earlier line of {task.category!r} already")
        tasks[task.category, task.task_id] = task

    read_lines(path, keep)
    if not tasks:
        raise DataError(f"{path}: no tasks in it")
    return list(tasks.values())


def by_category(tasks: Sequence[Task], limit: int, categories: Sequence[str] | None) -> dict[str, list[Task]]:
    """At most ``limit`` tasks of each category, in their order; MT-bench's own categories in turn.

    Args:
        tasks: to choose from.
        limit: per category.
        categories: wanted; None for all.

    Raises:
        DataError: for a category that has no task.
    """
    chosen: dict[str, list[Task]] = {}
    for task in tasks:
        chosen.setdefault(task.category, []).append(task)
    for category in categories or ():
        if category not in chosen:
            raise DataError(f"no task of category {category!r}; there are: {', '.join(sorted(chosen))}")
    return {
        category: _in_turn(members)[:limit]
        for category, members in chosen.items()
        if categories is None or category in categories
    }


def _in_turn(tasks: list[Task]) -> list[Task]:
    """Tasks with their kinds in turn, where the ids name kinds (as in ``writing/81``)."""
    places: dict[str, int] = {}
    ranked = []
    for task in tasks:
        kind = task.task_id.rpartition("/")[0]
        places[kind] = places.get(kind, 0) + 1
        ranked.append((places[kind], task))
    ranked.sort(key=lambda pair: pair[0])
    return [task for _, task in ranked]


def _parsed(value: dict[str, Any], name: str, number: int) -> Task:
    if "turns" in value:
        return _spec_bench(value)
    if "question" in value and "context" in value:
        return _hotpotqa(value, number)
    if "prompt" in value or "messages" in value:
        return _any(value, name, number)
    raise ValueError(
        "neither 'turns' (Spec-Bench), nor 'question' and 'context' (HotpotQA), nor 'prompt', nor 'messages' is there, "
        "but " + ", ".join(map(repr, value))
    )


def _any(value: dict[str, Any], name: str, number: int) -> Task:
    category = value.get("category", name)
    if not isinstance(category, str):
        raise ValueError(f"'category' must be a string, and is {category!r}")
    reference = _text(value, "reference") if value.get("reference") is not None else None
    judged = {"score": None if reference is None else "answer", "reference": reference}
    task_id = str(value.get("id", number))
    if "messages" not in value:
        prompt = _text(value, "prompt")
        return Task(task_id, category, prompt, prompt, **judged)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ValueError(f"'messages' must be a list of objects with 'role' and 'content', and is {messages!r:.80}")
    conversation = [{key: _text(message, key) for key in ("role", "content")} for message in messages]
    return Task(task_id, category, conversation[-1]["content"], **judged, conversation=tuple(conversation[:-1]))


def _spec_bench(value: dict[str, Any]) -> Task:
    question = parse_question(value)
    kind = f"{question.category}/" if question.category != question.group else ""
    score = _SCORES.get(question.group)
    # Summaries are held against those of the first method, the model's own.
    reference = question.reference if score == "last_number" else None
    if score == "last_number" and reference is None:
        score = None
    return Task(f"{kind}{question.question_id}", question.group, question.text, score=score, reference=reference)


def _hotpotqa(value: dict[str, Any], number: int) -> Task:
    question, answer, context = _text(value, "question"), _text(value, "answer"), value["context"]
    if not isinstance(context, list) or not context:
        raise ValueError(f"'context' must be a list of passages, and is {context!r:.80}")
    passages = "\n\n".join(map(_passage, context))
    text = f"Answer the question based on the given passages.\n\n{passages}\n\nQuestion: {question}"
    task_id = str(value.get("id", value.get("_id", number)))
    return Task(task_id, "hotpotqa", text, f"{text}\nAnswer:", "answer", answer)


def _passage(passage: Any) -> str:
    if isinstance(passage, list) and len(passage) == 2 and isinstance(passage[1], list):
        passage = {"title": passage[0], "text": "".join(map(str, passage[1]))}
    if not isinstance(passage, dict):
        raise ValueError(f"a passage must be an object with 'title' and 'text', and is {passage!r:.80}")
    return f"{_text(passage, 'title')}\n{_text(passage, 'text').strip()}"


def _text(value: dict[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str) or not value[key].strip():
        raise ValueError(f"{key!r} must be a string, not an empty one, and is {value.get(key)!r:.80}")
    return value[key]
