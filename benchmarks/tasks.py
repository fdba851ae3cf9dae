"""What is asked: tasks from JSON lines (Spec-Bench, HotpotQA, or any prompts), and their prompts as token ids."""

import gzip
import json
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


class Task(NamedTuple):
    """One question.

    Attributes:
        task_id: unique within its category.
        category: it counts under this one.
        text: the user's message.
        raw: what a model without a chat template continues; None for `text`.
        reference: the right answer; None where there is none.
    """

    task_id: str
    category: str
    text: str
    raw: str | None = None
    reference: str | None = None


def read_tasks(path: pathlib.Path) -> list[Task]:
    """Read a file with one JSON object a line, in any of four formats; gzipped if its name ends in ``.gz``.

    - Spec-Bench: ``question_id``, ``category``, ``turns`` (the first is used), optionally ``reference``. The eight
      categories of MT-bench count as one, ``mt_bench``.
    - HotpotQA with its passages: ``question``, ``answer``, ``context`` (a list of ``{"title", "text"}`` or of
      ``[title, [sentence, ...]]``), optionally ``id``.
    - HumanEval: ``task_id``, ``prompt``, ``entry_point``, ``test``. The reference is what the program ends with.
    - Any other: ``prompt``, optionally ``category`` (default: the file's name), ``id`` and ``reference``.

    Raises:
        ValueError: for a line in none of them; the text names it. Also for a file without tasks.
    """
    tasks = []
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            tasks.append(_task(json.loads(line), path.stem, number))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}:{number}: not a task ({type(error).__name__}: {error})") from None
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    return tasks


def by_category(tasks: Sequence[Task], limit: int, categories: Sequence[str] | None = None) -> dict[str, list[Task]]:
    """At most `limit` tasks of each category, in their order; MT-bench's own categories in turn.

    Raises:
        ValueError: for a wanted category without a task.
    """
    chosen: dict[str, list[Task]] = {}
    for task in tasks:
        chosen.setdefault(task.category, []).append(task)
    unknown = set(categories or ()) - set(chosen)
    if unknown:
        raise ValueError(f"no task of category {min(unknown)!r}; there are: {', '.join(sorted(chosen))}")
    return {
        category: _in_turn(members)[:limit]
        for category, members in chosen.items()
        if categories is None or category in categories
    }


def halves(tasks: Mapping[str, Sequence[Task]]) -> dict[str, list[Task]]:
    """The tasks of all categories in a random order, the first and the last half of them as categories."""
    mixed = [task for of in tasks.values() for task in of]
    random.Random(0).shuffle(mixed)
    middle = len(mixed) // 2
    return {"first half": mixed[:middle], "last half": mixed[middle:]}


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, of transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def tokenize(tokenizer: Any, tasks: Sequence[Task], max_tokens: int) -> list[list[int]]:
    """The prompt of each task as token ids, through the chat template if the model has one.

    A longer prompt than `max_tokens` loses the middle of its text (as in LongBench), so that instructions at either
    end, and the code just before a completion, stay.
    """
    if tokenizer.chat_template is None:
        return [fit(tokenizer, task.raw or task.text, tokenizer.encode, max_tokens) for task in tasks]

    def in_chat(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    return [fit(tokenizer, task.text, in_chat, max_tokens) for task in tasks]


def fit(tokenizer: Any, text: str, frame: Callable[[str], list[int]], max_tokens: int) -> list[int]:
    """The prompt that `frame` makes of a text, whose middle is cut until it has at most `max_tokens` tokens.

    Raises:
        ValueError: if even without any text the prompt is longer.
    """
    prompt = frame(text)
    if len(prompt) <= max_tokens:
        return prompt
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    kept = len(token_ids)
    while len(prompt) > max_tokens:
        # Two halves that are joined again may become more tokens than they were.
        kept -= len(prompt) - max_tokens
        if kept < 0:
            raise ValueError(f"an empty prompt has {len(frame(''))} tokens, more than the {max_tokens} allowed")
        head, tail = token_ids[: (kept + 1) // 2], token_ids[len(token_ids) - kept // 2 :]
        prompt = frame(tokenizer.decode(head) + tokenizer.decode(tail))
    return prompt


def _in_turn(tasks: list[Task]) -> list[Task]:
    """Tasks with their kinds in turn, where the ids name kinds (as in ``writing/81``)."""
    counts: dict[str, int] = {}
    ranks = []
    for task in tasks:
        kind = task.task_id.rpartition("/")[0]
        counts[kind] = counts.get(kind, 0) + 1
        ranks.append(counts[kind])
    return [tasks[index] for index in sorted(range(len(tasks)), key=ranks.__getitem__)]


def _task(value: dict[str, Any], name: str, number: int) -> Task:
    if "turns" in value:
        category, reference = value["category"], value.get("reference")
        kind = f"{category}/" if category in _MT_BENCH else ""
        first = reference[0] if isinstance(reference, list) and reference else None
        group = "mt_bench" if kind else category
        # The files' translations and the like are no right answers.
        right = first if group in ("math_reasoning", "summarization") else None
        return Task(f"{kind}{value['question_id']}", group, _text(value["turns"][0]), reference=right)
    if "question" in value and "context" in value:
        passages = "\n\n".join(map(_passage, value["context"]))
        text = f"Answer the question based on the given passages.\n\n{passages}\n\nQuestion: {_text(value['question'])}"
        return Task(str(value.get("id", number)), "hotpotqa", text, f"{text}\nAnswer:", _text(value["answer"]))
    prompt = _text(value["prompt"])
    if "entry_point" in value:
        text = f"Complete this function. Answer with its whole code, without explanations.\n\n```python\n{prompt}```"
        return Task(value["task_id"], "humaneval", text, prompt, f"{value['test']}\ncheck({value['entry_point']})")
    return Task(str(value.get("id", number)), str(value.get("category", name)), prompt, prompt, value.get("reference"))


def _passage(passage: Any) -> str:
    if isinstance(passage, list):
        return f"{passage[0]}\n{''.join(passage[1]).strip()}"
    return f"{passage['title']}\n{passage['text'].strip()}"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r:.80} must be a string that isn't empty")
    return value
