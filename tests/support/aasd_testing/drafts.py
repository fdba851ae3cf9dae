"""Comparing drafts of two paths that add the same votes in another order."""

import pytest

# Relative: a rounding error of 2^-24 for each of some hundred votes at each of at most 8 steps, most of them far less.
NEAR_TIE = 1e-5


def assert_same_drafts(ours, theirs, min_survival):
    """Equal up to the first step where two tokens, or the survival and its bar, are within rounding.

    Args:
        ours, theirs: token ids and survivals of a draft.
        min_survival: the bar.

    Returns:
        Whether the token ids are equal to the end.
    """
    for (our_id, our_survival), (their_id, their_survival) in zip(
        zip(*ours, strict=True), zip(*theirs, strict=True), strict=False
    ):
        if our_id != their_id:
            assert our_survival == pytest.approx(their_survival, rel=NEAR_TIE), (ours, theirs)
            return False
        assert our_survival == pytest.approx(their_survival, rel=NEAR_TIE)
    shorter, longer = sorted((ours[1], theirs[1]), key=len)
    assert all(survival == pytest.approx(min_survival, rel=NEAR_TIE) for survival in longer[len(shorter) :][:1])
    return len(shorter) == len(longer)
