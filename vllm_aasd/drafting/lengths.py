"""How many draft tokens each request of a batch gets: as many as are worth their share of the next step."""

import numpy as np

REPRODUCIBLE_SURVIVAL = 0.1
"""What a draft token is worth verifying for where its price must not be asked: between that at one request at a
time, and that at sixteen."""


def draft_lengths(survival: np.ndarray, step_times: np.ndarray, overhead: float = 1.0) -> np.ndarray:
    """Choose the draft lengths that make the batch emit most tokens a second.

    A step in which n draft tokens are verified emits one token per request and, in expectation, the sum of
    the survivals of those n. Its time depends on how many tokens are in the batch, not on whose they are. So
    for each n the best drafts are the n likeliest tokens of the whole batch, and the best n maximises::

        (B + s_1 + ... + s_n) / (T(B + n) overhead[n > 0])      s sorted descending, B requests, T the step time

    Survival falls along a draft, so the likeliest tokens are a prefix of each. n = 0 is a legal answer.

    Args:
        survival: ``[B, K]``, the probability that a draft is accepted up to and including each of its tokens;
            non-increasing along a row, 0 behind a draft's end.
        step_times: ``[>= B + 1]``, the time of a step by the tokens in its batch, in any unit; beyond its end
            nothing is drafted.
        overhead: by what a step with drafts takes longer, beyond what its tokens take; >= 1.

    Returns:
        ``[B]`` int64, the length of each draft.
    """
    return lengths_and_gain(survival, step_times, overhead)[0]


def lengths_and_gain(survival: np.ndarray, step_times: np.ndarray, overhead: float = 1.0) -> tuple[np.ndarray, float]:
    """Choose as `draft_lengths`, and say how many times as many tokens a second that makes as no drafts at all; >= 1."""
    num_requests, width = survival.shape
    flat = survival.ravel()
    # Stable, so that of equal survivals in a row the earlier token comes first.
    order = np.argsort(-flat, kind="stable")
    order = order[: min(np.count_nonzero(flat), len(step_times) - num_requests - 1)]
    emitted = num_requests + np.concatenate(([0.0], np.cumsum(flat[order])))
    rate = emitted / step_times[num_requests : num_requests + len(order) + 1]
    rate[1:] /= overhead
    best = int(np.argmax(rate))
    gain = float(rate[best] / rate[0]) if best else 1.0
    return np.bincount(order[:best] // width, minlength=num_requests), gain


def reproducible_lengths(survival: np.ndarray) -> np.ndarray:
    """Draft lengths that depend on nothing but the drafts: neither on time nor on other requests.

    For sampled requests with a seed. A request's random numbers are drawn in the order of its tokens and draft
    tokens, so the same seed gives the same answer only if the same lengths are drafted.

    Args:
        survival: ``[B, K]``, as for `draft_lengths`.

    Returns:
        ``[B]`` int64, the tokens whose survival is at least `REPRODUCIBLE_SURVIVAL`.
    """
    return np.count_nonzero(survival >= REPRODUCIBLE_SURVIVAL, axis=1)
