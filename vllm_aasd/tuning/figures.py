"""From answers to figures: what a way of answering gains, and what it does to the answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_aasd.tuning.statistics import (
    num_copied,
    num_repeats,
    rouge_l,
    stratified_difference,
    stratified_gain,
    stratified_ratio,
)

COPIED_SPAN = 8
REPEATED_SPAN = 4


class Bounds(NamedTuple):
    """What a recommended setting may do to the answers.

    Attributes:
        agreement: the least mean ROUGE-L F1 to the answers without speculation, in [0, 1].
        copied: by how much the share of copied tokens may exceed theirs, in [0, 1].
        repeated: the same of repeated runs.
    """

    agreement: float
    copied: float
    repeated: float


def row(
    prompt: Sequence[int],
    answer: Sequence[int],
    reference: Sequence[int],
    seconds: float,
    scored: Sequence[tuple[float, float]],
    score: float | None,
) -> dict[str, Any]:
    """What one answer comes to.

    Args:
        prompt, answer, reference: token ids, the reference being the greedy answer without speculation.
        seconds: from the answer's first token to its last.
        scored: per token, its log-probability under the target and that of the likeliest token there.
        score: of the task, in [0, 1]; None where there is none.
    """
    repeated, runs = num_repeats(answer, REPEATED_SPAN)
    return {
        "tokens": len(answer),
        "decode_tokens": max(len(answer) - 1, 0),
        "seconds": round(seconds, 5),
        "rouge_l": round(rouge_l(answer, reference), 4),
        "equal": int(list(answer) == list(reference)),
        "copied": num_copied(answer, prompt, COPIED_SPAN),
        "repeated": repeated,
        "runs": runs,
        "not_argmax": sum(logprob < best for logprob, best in scored),
        "regret": round(sum(best - logprob for logprob, best in scored), 4),
        "score": score,
    }


def figures(
    rows: Sequence[Mapping[str, Any]],
    off: Sequence[Mapping[str, Any]],
    strict: Sequence[Mapping[str, Any]],
    num_accepted: int,
    groups: Sequence[str],
) -> dict[str, Any]:
    """What a way of answering comes to, each figure the mean over groups with a bootstrap interval over prompts.

    Args:
        rows: as from `row`, one per prompt.
        off, strict: those without speculation, and of strict verification.
        num_accepted: draft tokens accepted in all its answers.
        groups: of each prompt.

    Returns:
        - ``speed``, ``speed_to_strict``: seconds per output token behind the first of the other way by its own, on the
          same prompts;
        - ``mal``: tokens per step of decoding, over all prompts (a number);
        - ``rouge_l``: ROUGE-L F1 of the answer's tokens to those without speculation; ``equal``: share of answers that
          are the same tokens;
        - ``copied``: share of tokens in runs of at least `COPIED_SPAN` that the prompt holds;
        - ``repeated``: share of runs of `REPEATED_SPAN` tokens that stood earlier in the answer;
        - ``not_argmax``: share of tokens that the target, given what is before them, finds less likely than another;
          judged by a pass over whole answers, which rounds differently in bfloat16: the row without speculation shows
          how much of it is that;
        - ``regret``: nats per token by which those are less likely;
        - ``score``, ``score_drop``: the tasks' mean score, and how much less it is than without speculation; None where
          no task has one.
    """

    def column(name: str, of: Sequence[Mapping[str, Any]] = rows) -> list[Any]:
        return [one[name] for one in of]

    def mean(name: str, by: str | None = None) -> dict[str, float]:
        return stratified_ratio(column(name), column(by) if by else [1] * len(rows), groups)

    def faster_than(other: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        theirs, ours = ((column("seconds", of), column("decode_tokens", of)) for of in (other, rows))
        return stratified_gain(theirs, ours, groups)

    decoded = sum(column("decode_tokens"))
    judged = [index for index, score in enumerate(column("score")) if score is not None]
    scores, before = ([column("score", of)[index] for index in judged] for of in (rows, off))
    judged_groups = [groups[index] for index in judged]
    return {
        "speed": faster_than(off),
        "speed_to_strict": faster_than(strict),
        "mal": decoded / (decoded - num_accepted) if decoded > num_accepted else None,
        "rouge_l": mean("rouge_l"),
        "equal": mean("equal"),
        "copied": mean("copied", "tokens"),
        "repeated": mean("repeated", "runs"),
        "not_argmax": mean("not_argmax", "tokens"),
        "regret": mean("regret", "tokens"),
        "score": stratified_ratio(scores, [1] * len(judged), judged_groups) if judged else None,
        "score_drop": stratified_difference(before, scores, judged_groups) if judged else None,
    }


def excess(found: Mapping[str, Any], off: Mapping[str, Any], bounds: Bounds) -> list[str]:
    """In which figures a way of answering does more to the answers than it may; a score, beyond its noise."""
    over = []
    if found["rouge_l"]["value"] < bounds.agreement:
        over.append("rouge_l")
    for name in ("copied", "repeated"):
        # What has no run at all repeats none.
        if np.nan_to_num(found[name]["value"] - off[name]["value"]) > getattr(bounds, name):
            over.append(name)
    if found["score_drop"] is not None and found["score_drop"]["low"] > 0:
        over.append("score_drop")
    return over


def fastest(found: Mapping[str, Mapping[str, Any]], allowed: Sequence[str], strict: str) -> str:
    """The name of the fastest; strict, unless another is faster beyond the noise.

    Args:
        found: figures by name.
        allowed: names to choose from; `strict` may always be chosen.
        strict: the name of strict verification.
    """
    better = [name for name in allowed if (found[name]["speed_to_strict"]["low"] or 0) > 1]
    return max(better, key=lambda name: found[name]["speed"]["value"], default=strict)
