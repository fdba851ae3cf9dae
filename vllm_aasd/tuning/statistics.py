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
    values = _stratified(numerators, denominators, groups, seed)
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def stratified_gain(
    ours: tuple[Sequence[float], Sequence[float]],
    theirs: tuple[Sequence[float], Sequence[float]],
    groups: Sequence[str],
    seed: int = 0,
) -> dict[str, float | None]:
    """One `stratified_ratio` by another on the same questions, which a resample draws for both.

    Args:
        ours, theirs: numerators and denominators.
        groups, seed: see `stratified_ratio`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return with_interval(_stratified(*ours, groups, seed) / _stratified(*theirs, groups, seed))


def _stratified(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str], seed: int
) -> np.ndarray:
    """``[1 + RESAMPLES]``: the mean over groups of each group's ratio of sums, of all and of each resample."""
    rng = np.random.default_rng(seed)
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratios = []
    for group in dict.fromkeys(groups):
        members = np.array([index for index, other in enumerate(groups) if other == group])
        drawn = rng.choice(members, (RESAMPLES, len(members)))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = top[members].sum() / bottom[members].sum()
            ratios.append(np.concatenate([[whole], top[drawn].sum(1) / bottom[drawn].sum(1)]))
    return np.mean(ratios, axis=0)


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


def crossed_ratio(
    numerators: np.ndarray, denominators: np.ndarray, prompt_draws: np.ndarray, round_draws: np.ndarray
) -> np.ndarray:
    """A ratio of sums over prompts and rounds, and the same of resamples of both.

    Args:
        numerators, denominators: ``[num_prompts, num_rounds]``.
        prompt_draws: ``[num_resamples, num_prompts]``, how often each prompt was drawn.
        round_draws: ``[num_resamples, num_rounds]``, how often each round was.

    Returns:
        ``[1 + num_resamples]``: of all, then of each resample; NaN where the denominators sum to 0.
    """
    top, bottom = (
        np.concatenate([[values.sum()], np.einsum("sp,pr,sr->s", prompt_draws, values, round_draws)])
        for values in (np.asarray(numerators, float), np.asarray(denominators, float))
    )
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def draws(size: int, rng: np.random.Generator) -> np.ndarray:
    """``[RESAMPLES, size]``, how often each of ``size`` things is drawn in as many draws with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float)


def with_interval(values: np.ndarray) -> dict[str, float | None]:
    """A figure and the 2.5th and 97.5th percentile of its resamples; None for what can't be told.

    Args:
        values: ``[1 + num_resamples]``, the figure first.
    """
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (None, None)
    return {
        "value": float(values[0]),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
    }


def stratified_difference(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str], seed: int = 0
) -> dict[str, float | None]:
    """The mean over groups of the mean difference of two figures of the same questions, with a bootstrap interval.

    Args:
        ours, theirs: ``[n]``, one entry per question.
        groups, seed: see `stratified_ratio`.
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return with_interval(_stratified(differences, np.ones(len(differences)), groups, seed))
