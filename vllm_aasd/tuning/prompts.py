"""Tasks as token ids, through the model's chat template where it has one, cut to a greatest length."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_aasd.tuning.tasks import Task


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def tokenise(tokenizer: Any, tasks: Sequence[Task], max_tokens: int) -> list[list[int]]:
    """The prompt of each task.

    Args:
        tokenizer: of transformers.
        tasks: to be asked.
        max_tokens: a longer prompt loses the middle of its text (as in LongBench), so that instructions at
            either end, and the code just before a completion, stay.
    """
    return [fit(tokenizer, *_framed(tokenizer, task), max_tokens) for task in tasks]


def fit(tokenizer: Any, text: str, frame: Callable[[str], list[int]], max_tokens: int) -> list[int]:
    """The prompt of a text whose middle is cut out until it is no longer than ``max_tokens``.

    Args:
        tokenizer: of transformers.
        text: to be cut.
        frame: makes a prompt of a text.
        max_tokens: of the prompt.

    Raises:
        ValueError: if even without any text the prompt is longer.
    """
    prompt = frame(text)
    if len(prompt) <= max_tokens:
        return prompt
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    kept = len(token_ids)
    while len(prompt) > max_tokens:
        # Halves that are put together again may become more tokens than they were.
        kept -= len(prompt) - max_tokens
        if kept < 0:
            raise ValueError(f"{max_tokens} tokens don't hold an empty prompt: {len(frame(''))}")
        head, tail = token_ids[: (kept + 1) // 2], token_ids[len(token_ids) - kept // 2 :]
        prompt = frame(tokenizer.decode(head) + tokenizer.decode(tail))
    return prompt


def _framed(tokenizer: Any, task: Task) -> tuple[str, Callable[[str], list[int]]]:
    if tokenizer.chat_template is None:
        return task.text if task.raw is None else task.raw, tokenizer.encode

    def in_chat(text: str) -> list[int]:
        return tokenizer.apply_chat_template(
            [*task.conversation, {"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )

    return task.text, in_chat
