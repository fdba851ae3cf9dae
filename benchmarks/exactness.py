"""Whether answers that should be the greedy ones are, but for near ties; judged by teacher forcing.

Two runs of one model in bfloat16 batch their rows differently, so they round differently, and where two
tokens are nearly as likely either may come. So an answer that differs isn't wrong for that alone: at its
first difference, the target, given the prompt and what both answers share, must find both tokens about as
likely as its likeliest. The bound is `benchmarks.methods.NEAR_TIE`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine import Engine


class Difference(NamedTuple):
    """The first difference of two answers.

    Attributes:
        shared: the prompt's tokens and those that both answers begin with.
        tokens: what either has next; None where one ends.
    """

    shared: tuple[int, ...]
    tokens: tuple[int | None, int | None]


def first_difference(prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> Difference | None:
    """Where two answers to a prompt part; None if they are equal."""
    if one == other:
        return None
    at = common_prefix(one, other)
    tokens = tuple(answer[at] if at < len(answer) else None for answer in (one, other))
    return Difference((*prompt, *one[:at]), tokens)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def gaps(engine: Engine, differences: Sequence[Difference]) -> dict[Difference, float]:
    """How far from a tie each difference is.

    Args:
        engine: of the target.
        differences: to be judged, each once.

    Returns:
        Per difference, nats from the target's likeliest token there to the less likely of the two; infinite
        where one answer ends and the other goes on, for ending is a token too.
    """
    found = dict.fromkeys(differences, float("inf"))
    judged = [one for one in found if None not in one.tokens]
    requests = [scoring_request([*one.shared, token]) for one in judged for token in one.tokens]
    answers = engine.run(requests, 8)[0] if requests else []
    for index, one in enumerate(judged):
        scores = [answer["scores"][0] for answer in answers[2 * index : 2 * index + 2]]
        # numpy's maximum, for Python's passes over what isn't a number.
        found[one] = float(np.max([best - logprob for logprob, best in scores]))
    return found


def scoring_request(token_ids: list[int]) -> dict[str, Any]:
    """A request that scores its last token; the one token more that it generates doesn't matter."""
    return {
        "prompt_token_ids": token_ids,
        "sampling": {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1},
        "score_from": len(token_ids) - 1,
    }


def verdict(
    differences: Sequence[Difference | None], found: Mapping[Difference, float], bound: float
) -> dict[str, Any]:
    """Judge one method.

    Args:
        differences: of its answers and the first method's, None for equal ones.
        found: their `gaps`.
        bound: the widest that is a tie, in nats.

    Returns:
        ``num_answers``; ``num_different`` of them; ``num_wider``, those beyond the bound; ``is_exact`` if
        there is none; ``largest_gap_nats``, None where that is infinite or not a number.
    """
    wide = [found[one] for one in differences if one is not None]
    largest = max(wide, default=0.0)
    return {
        "num_answers": len(differences),
        "num_different": len(wide),
        "num_wider": sum(not gap <= bound for gap in wide),
        "largest_gap_nats": round(largest, 4) if math.isfinite(largest) else None,
        # Not `>`: a gap that isn't a number is no tie.
        "is_exact": all(gap <= bound for gap in wide),
    }


def failed(verdicts: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The methods, by label, whose answers aren't what they promise."""
    return [label for label, found in verdicts.items() if found and not found["is_exact"]]
