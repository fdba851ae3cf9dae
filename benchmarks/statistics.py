"""What is computed from outputs and counts; token ids and numbers only."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def stratified_ratio(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """The mean over groups of each group's ratio of sums, with a bootstrap interval.

    With every denominator 1 it is the mean of the groups' means.

    Args:
        numerators, denominators: ``[n]``, one entry per question.
        groups: ``[n]``, the group of each question.
        seed: of the resampling, which draws questions within each group.

    Returns:
        ``{"value": ..., "low": ..., "high": ...}``, the latter two the 2.5th and 97.5th percentile of
        `RESAMPLES` resamples. NaN where a group's denominators sum to 0.
    """
    rng = np.random.default_rng(seed)
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    values, resampled = [], []
    for group in dict.fromkeys(groups):
        members = np.array([index for index, other in enumerate(groups) if other == group])
        draws = rng.choice(members, (RESAMPLES, len(members)))
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(top[members].sum() / bottom[members].sum())
            resampled.append(top[draws].sum(1) / bottom[draws].sum(1))
    low, high = np.percentile(np.mean(resampled, axis=0), (2.5, 97.5))
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def lcs_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence of two token sequences."""
    if not a or not b:
        return 0
    b_ids = np.asarray(b)
    row = np.zeros(len(b) + 1, np.int64)
    for token in a:
        # row[j + 1] = row[j] + 1 on a match, else the larger neighbour. A match never loses to a neighbour,
        # and the neighbour on the left is what the running maximum brings.
        candidates = np.where(b_ids == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(candidates)
    return int(row[-1])


def rouge_l(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-L F1 of two token sequences: 1 if they are equal, 0 if they share nothing (Lin, 2004)."""
    if not a and not b:
        return 1.0
    return 2 * lcs_length(a, b) / (len(a) + len(b))


def num_copied(output: Sequence[int], prompt: Sequence[int], span: int = 8) -> int:
    """How many tokens of the output lie in a run of at least ``span`` tokens that the prompt holds too."""
    runs = {tuple(prompt[i : i + span]) for i in range(len(prompt) - span + 1)}
    copied = np.zeros(len(output), bool)
    for i in range(len(output) - span + 1):
        if tuple(output[i : i + span]) in runs:
            copied[i : i + span] = True
    return int(copied.sum())


def num_repeats(output: Sequence[int], span: int = 4) -> tuple[int, int]:
    """How many n-grams of ``span`` tokens stood earlier in the output, and how many it has in all."""
    runs = [tuple(output[i : i + span]) for i in range(len(output) - span + 1)]
    return len(runs) - len(set(runs)), len(runs)
