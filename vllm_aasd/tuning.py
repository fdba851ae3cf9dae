"""Speed against damage: what request options gain, and what they do to the answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
COPIED_SPAN = 8
REPEATED_SPAN = 4


def row(
    prompt: Sequence[int], answer: Sequence[int], plain: Sequence[int], seconds: float, score: float | None
) -> dict[str, Any]:
    """The counts of one answer, decoded in `seconds`; `plain` is the greedy answer without speculation."""
    ngrams = [tuple(answer[i : i + REPEATED_SPAN]) for i in range(len(answer) - REPEATED_SPAN + 1)]
    return {
        "tokens": len(answer),
        "decode_tokens": max(len(answer) - 1, 0),
        "seconds": seconds,
        "rouge_l": rouge_l(answer, plain),
        "equal": int(list(answer) == list(plain)),
        "copied": num_copied(answer, prompt),
        "repeated": len(ngrams) - len(set(ngrams)),
        "ngrams": len(ngrams),
        "score": score,
    }


def figures(
    rows: Sequence[Mapping[str, Any]],
    off: Sequence[Mapping[str, Any]],
    strict: Sequence[Mapping[str, Any]],
    num_accepted: float,
    groups: Sequence[str],
) -> dict[str, Any]:
    """The results of one set of options, each a mean over groups with a bootstrap interval over prompts.

    Args:
        rows, off, strict: from `row`, one per prompt: with these options, without speculation, and with strict.
        num_accepted: accepted draft tokens of all answers.
        groups: the group of each prompt.

    Returns:
        ``speed`` and ``speed_to_strict``, by time per output token after the first; ``mal``, tokens per decode step (a
        number); ``rouge_l`` and the share ``equal``, to no speculation; the shares of tokens ``copied`` from the prompt
        and of n-grams ``repeated``; ``score`` of the tasks and ``score_drop`` from no speculation, None without any;
        both ``by_group``, for groups with scores.
    """

    def column(name: str, of: Sequence[Mapping[str, Any]] = rows) -> list[Any]:
        return [one[name] for one in of]

    def mean(name: str, by: str | None = None) -> dict[str, float | None]:
        return stratified_ratio(column(name), column(by) if by else [1] * len(rows), groups)

    def speed(other: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        theirs, ours = ((column("seconds", of), column("decode_tokens", of)) for of in (other, rows))
        return stratified_ratio(*theirs, groups, ours)

    decoded = sum(column("decode_tokens"))
    judged = [index for index, score in enumerate(column("score")) if score is not None]
    scores = [rows[index]["score"] for index in judged]
    drops = [off[index]["score"] - rows[index]["score"] for index in judged]
    judged_groups = [groups[index] for index in judged]

    def judge(values: list[float], group: str | None = None) -> dict[str, float | None] | None:
        kept = [(value, of) for value, of in zip(values, judged_groups, strict=True) if group in (None, of)]
        return stratified_ratio([value for value, _ in kept], [1] * len(kept), [of for _, of in kept]) if kept else None

    return {
        "speed": speed(off),
        "speed_to_strict": speed(strict),
        "mal": decoded / (decoded - num_accepted) if decoded > num_accepted else None,
        "rouge_l": mean("rouge_l"),
        "equal": mean("equal"),
        "copied": mean("copied", "tokens"),
        "repeated": mean("repeated", "ngrams"),
        "score": judge(scores),
        "score_drop": judge(drops),
        "by_group": {
            group: {"score": judge(scores, group), "score_drop": judge(drops, group)}
            for group in dict.fromkeys(judged_groups)
        },
    }


def excess(found: Mapping[str, Any], off: Mapping[str, Any], bounds: Mapping[str, float]) -> list[str]:
    """The results out of bounds: too low ``rouge_l``, ``copied`` or ``repeated`` too far above `off`, a lower score."""
    over = ["rouge_l"] if found["rouge_l"]["value"] < bounds["rouge_l"] else []
    # Answers that are too short for an n-gram repeat none.
    more = {name: (found[name]["value"] or 0) - (off[name]["value"] or 0) for name in ("copied", "repeated")}
    over += [name for name, value in more.items() if value > bounds[name]]
    return over + ["score_drop"] * bool(found["score_drop"] and found["score_drop"]["low"] > 0)


def fastest(found: Mapping[str, Mapping[str, Any]], allowed: Sequence[str], strict: str) -> str:
    """The name of the fastest allowed options; `strict`, unless others are significantly faster."""
    better = [name for name in allowed if (found[name]["speed_to_strict"]["low"] or 0) > 1]
    return max(better, key=lambda name: found[name]["speed"]["value"], default=strict)


def rouge_l(a: Sequence[object], b: Sequence[object]) -> float:
    """ROUGE-L F1 (Lin, 2004) of two sequences: the share of tokens in their longest common subsequence."""
    if not a and not b:
        return 1.0
    lengths = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for i, other in enumerate(b, 1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if token == other else max(lengths[i], lengths[i - 1])
    return 2 * lengths[-1] / (len(a) + len(b))


def num_copied(output: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of output tokens in spans of at least `COPIED_SPAN` tokens that are in the prompt too."""
    spans = {tuple(prompt[i : i + COPIED_SPAN]) for i in range(len(prompt) - COPIED_SPAN + 1)}
    copied = np.zeros(len(output), bool)
    for i in range(len(output) - COPIED_SPAN + 1):
        if tuple(output[i : i + COPIED_SPAN]) in spans:
            copied[i : i + COPIED_SPAN] = True
    return int(copied.sum())


def stratified_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[str],
    by: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, float | None]:
    """The mean over groups of each group's ratio of sums, with a 95% bootstrap interval.

    Args:
        numerators, denominators: ``[n]``, one entry per prompt.
        groups: ``[n]``, the group of each prompt; a resample draws prompts within each.
        by: numerators and denominators of the same prompts, whose ratio divides the first.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _resampled(numerators, denominators, groups)
        return with_interval(values if by is None else values / _resampled(*by, groups))


def with_interval(values: np.ndarray) -> dict[str, float | None]:
    """A value with the 2.5th and 97.5th percentiles of its resamples; None if it is undefined.

    Args:
        values: ``[1 + num_resamples]``, the value first.
    """
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(values[np.isfinite(values)], (2.5, 97.5))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _resampled(numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str]) -> np.ndarray:
    """``[1 + RESAMPLES]``: the mean over groups of each group's ratio of sums, of all and of each resample."""
    rng = np.random.default_rng(0)
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratios = []
    for group in dict.fromkeys(groups):
        members = np.array([index for index, other in enumerate(groups) if other == group])
        drawn = rng.choice(members, (RESAMPLES, len(members)))
        whole = top[members].sum() / bottom[members].sum()
        ratios.append(np.concatenate([[whole], top[drawn].sum(1) / bottom[drawn].sum(1)]))
    return np.mean(ratios, axis=0)
