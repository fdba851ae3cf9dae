"""Whether a method's greedy answers are plain decoding's.

A batch with drafts is rounded differently, so an exact method's answer may differ where two tokens are nearly tied.
At its first difference, the target, given the prompt and what both answers share, must find both tokens about as
likely as its likeliest. The bound is `benchmarks.methods.NEAR_TIE`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine import Engine

Difference = tuple[tuple[int, ...], tuple[int | None, int | None]]
"""The first difference of two answers: the prompt and what both begin with; what either has next, None for its end."""


def first_difference(prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> Difference | None:
    """Where two answers to a prompt differ first; None if they are equal."""
    if one == other:
        return None
    same = [a == b for a, b in zip(one, other, strict=False)]
    at = same.index(False) if False in same else len(same)
    first, second = (answer[at] if at < len(answer) else None for answer in (one, other))
    return (*prompt, *one[:at]), (first, second)


def gaps(engine: Engine, differences: Sequence[Difference], beside_grammar: bool = False) -> dict[Difference, float]:
    """How far from a tie each difference is.

    Args:
        engine: of the target.
        differences: to be judged.
        beside_grammar: whether the answers were held to a grammar, which the judge isn't: what the grammar forbids may
            be likelier than both.

    Returns:
        Per difference, nats from the target's likeliest token there, or the likelier of the two beside a grammar, to
        the less likely of the two; infinite where one answer ends and the other goes on, for ending is a token too.
    """
    found = dict.fromkeys(differences, math.inf)
    judged = [one for one in found if None not in one[1]]
    sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1}
    requests = [
        {"prompt_token_ids": [*shared, token], "sampling": sampling} for shared, tokens in judged for token in tokens
    ]
    answers = engine.run(requests, 8)[0] if requests else []
    scores = [answer["prompt_logprobs"][-1] for answer in answers]
    for one, first, second in zip(judged, scores[::2], scores[1::2], strict=True):
        own = [first[str(one[1][0])], second[str(one[1][1])]]
        best = own if beside_grammar else [*first.values(), *second.values()]
        # Where something isn't a number there is no tie.
        found[one] = math.inf if math.isnan(sum(own + best)) else max(best) - min(own)
    return found


def verdict(
    differences: Sequence[Difference | None], found: Mapping[Difference, float], bound: float
) -> dict[str, Any]:
    """Judge one method.

    Args:
        differences: of its answers and the first method's, None for equal ones.
        found: their `gaps`.
        bound: the widest that is a tie, in nats.

    Returns:
        ``answers``, how many; ``different`` and ``wider`` than the bound, how many of them; ``largest_gap_nats``, None
        where that is infinite.
    """
    wide = [found[one] for one in differences if one is not None]
    largest = max(wide, default=0.0)
    return {
        "answers": len(differences),
        "different": len(wide),
        "wider": sum(gap > bound for gap in wide),
        "largest_gap_nats": largest if math.isfinite(largest) else None,
    }


def verdicts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    answers: Mapping[str, Sequence[dict[str, Any]]],
    bound: float,
    beside_grammar: bool = False,
) -> dict[str, dict[str, Any]]:
    """Judge all methods but the first by the first's answers.

    Args:
        engine: of the target, see `gaps`.
        prompts: of the answers.
        answers: by method, to each prompt, with ``token_ids``.
        bound, beside_grammar: see `verdict` and `gaps`.
    """
    plain, *others = answers
    differences = {
        label: [
            first_difference(prompt, one["token_ids"], other["token_ids"])
            for prompt, one, other in zip(prompts, answers[plain], answers[label], strict=True)
        ]
        for label in others
    }
    found = gaps(engine, [one for of in differences.values() for one in of if one is not None], beside_grammar)
    return {label: verdict(of, found, bound) for label, of in differences.items()}


def failed(verdicts: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The methods, by label, whose answers aren't what they promise."""
    return [label for label, found in verdicts.items() if found and found["wider"]]
