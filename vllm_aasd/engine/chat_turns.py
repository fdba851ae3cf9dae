"""What a model's chat template writes around a question and before an answer."""

from typing import Any, NamedTuple

_MARK = "Why?"


def assistant_prefix(tokenizer: Any) -> list[int]:
    """What a chat template puts before the assistant's answer; without a template, what begins a text."""
    around = turns(tokenizer)
    if around is not None:
        return tokenizer.encode(around.answering, add_special_tokens=False)
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


class Turns(NamedTuple):
    """What a chat template puts around the user's question.

    Attributes:
        before: before the question.
        after: from the question to the beginning of the assistant's turn.
        answering: at the beginning of the assistant's turn.
    """

    before: str
    after: str
    answering: str


def turns(tokenizer: Any) -> Turns | None:
    """How the model's chat template writes one question; None without a usable template."""
    question = [{"role": "user", "content": _MARK}]
    try:
        asked = tokenizer.apply_chat_template(question, tokenize=False)
        answering = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    # transformers raises ValueError without a template; a template may raise anything.
    except Exception:
        return None
    before, mark, after = asked.rpartition(_MARK)
    if not mark or len(answering) <= len(asked) or not answering.startswith(asked):
        return None
    return Turns(before, after, answering[len(asked) :])
