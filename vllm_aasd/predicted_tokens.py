"""A prediction: text that a client expects in the answer, as OpenAI's ``prediction`` parameter gives it.

What such a parameter may look like, and how much of a prediction an answer took up. The latter is
`accepted_prediction_tokens` and `rejected_prediction_tokens` of OpenAI's usage: tokens of the prediction that appeared
in the completion, and those that did not. That is a property of the two texts, whatever was drafted or accepted while
one of them was generated.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

OPTION = "aasd_prediction"
"""The request option; in the engine its value is a list of token ids."""

PARAMETER = "prediction"
"""OpenAI's parameter of a chat completion."""

MIN_RUN = 3
"""Tokens that prediction and completion must share in a row. Shorter runs occur in unrelated texts, too."""

_MAX_TRIES = 8


def text_of(parameter: Any) -> str | None:
    """The text of OpenAI's parameter; None if it is malformed.

    Args:
        parameter: ``{"type": "content", "content": ...}``, where the content is a text, or a list of at least one
            ``{"type": "text", "text": ...}``, whose texts follow one another.
    """
    if not isinstance(parameter, dict) or parameter.get("type") != "content":
        return None
    content = parameter.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def are_token_ids(value: Any, vocab_size: int, max_tokens: int) -> bool:
    """Whether a value is a list of at most `max_tokens` ids of a vocabulary."""
    if not isinstance(value, list) or len(value) > max_tokens:
        return False
    return all(type(one) is int and 0 <= one < vocab_size for one in value)


class PredictionUsage(NamedTuple):
    """How many tokens of a prediction an answer has, and how many it hasn't."""

    accepted: int
    rejected: int


def usage_of(prediction: Sequence[int], completions: Iterable[Sequence[int]]) -> PredictionUsage:
    """What became of a prediction, added up over a request's completions (one, unless it asked for `n`).

    Args:
        prediction: its token ids.
        completions: the token ids of each.
    """
    accepted = [accepted_tokens(prediction, completion) for completion in completions]
    return PredictionUsage(sum(accepted), len(prediction) * len(accepted) - sum(accepted))


def accepted_tokens(prediction: Sequence[int], completion: Sequence[int]) -> int:
    """How many tokens of a prediction appear in a completion.

    Those in runs of at least `MIN_RUN` tokens (or the whole prediction, if that is shorter) that the completion has,
    too. A run may stand elsewhere in the completion than in the prediction. No token of either counts twice.

    Runs are found greedily from the completion's beginning: where its next tokens begin somewhere in the prediction,
    the run goes on as far as both agree. Of several places, the first after the last run counts, else the first of
    all. Time is about linear in both lengths, however often tokens repeat, since a place is found by hashing and
    bisection, and tokens that are used up are skipped once per place, or `_MAX_TRIES` times at most.
    """
    length = min(MIN_RUN, len(prediction))
    if length == 0:
        return 0
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, run in enumerate(_runs(prediction, length)):
        places[run].append(place)
    first_free = dict.fromkeys(places, 0)
    taken = bytearray(len(prediction))

    def is_free(place: int) -> bool:
        return 1 not in taken[place : place + length]

    def free_place(run: tuple[int, ...], behind: int) -> int | None:
        found = places.get(run)
        if found is None:
            return None
        begin = bisect.bisect_left(found, behind)
        for place in found[begin : begin + _MAX_TRIES]:
            if is_free(place):
                return place
        # What is taken stays so, and is never looked at again.
        while first_free[run] < len(found) and not is_free(found[first_free[run]]):
            first_free[run] += 1
        return found[first_free[run]] if first_free[run] < len(found) else None

    behind = position = 0
    runs = list(_runs(completion, length))
    while position < len(runs):
        begin = free_place(runs[position], behind)
        if begin is None:
            position += 1
            continue
        behind = begin
        while (
            position < len(completion)
            and behind < len(prediction)
            and not taken[behind]
            and completion[position] == prediction[behind]
        ):
            taken[behind] = 1
            behind += 1
            position += 1
    return sum(taken)


def _runs(token_ids: Sequence[int], length: int) -> Iterable[tuple[int, ...]]:
    """All runs of `length` tokens, by their beginnings."""
    return zip(*(token_ids[offset:] for offset in range(length)), strict=False)
