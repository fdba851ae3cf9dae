"""How far the survival that the drafter estimates holds for one request, learnt from its own verifications."""

import numpy as np

_RATE = 0.03
_LOWEST, _HIGHEST = 0.3, 1.1
# Per step without a draft: after 40 of them two thirds of the distrust are gone, and drafting is tried again.
_FORGETTING = 0.03


class Trust:
    """One factor on the probability of each draft token, near 1 where the estimate holds.

    A request whose drafts keep failing ends with survivals that are worth no step time, and so stops paying
    for them; while it drafts nothing, the factor drifts back to 1, and it is tried again.

    Attributes:
        factor: on the probability that a draft token is accepted, given that those before it were.
    """

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def apply(self, survival: np.ndarray) -> np.ndarray:
        """The survival to be expected of a draft.

        Args:
            survival: ``[n]`` float32, as estimated.

        Returns:
            ``[n]`` float32, of the drafter's estimate and this request's record, at most 1.
        """
        return np.cumprod(np.minimum(_conditional(survival) * np.float32(self.factor), np.float32(1)))

    def observe(self, survival: np.ndarray, num_accepted: int) -> None:
        """Learn from the verification of a draft.

        Args:
            survival: ``[n]``, what was expected of it (`apply`); n = 0 for a step without a draft.
            num_accepted: how many of its tokens were accepted.
        """
        if not len(survival):
            self.factor += _FORGETTING * (1.0 - self.factor)
            return
        expected = float(_conditional(survival[: num_accepted + 1]).sum())
        factor = self.factor * np.exp(_RATE * (num_accepted - expected))
        self.factor = float(np.clip(factor, _LOWEST, _HIGHEST))


def _conditional(survival: np.ndarray) -> np.ndarray:
    """The probability of each token given those before it, from that of all up to it."""
    conditional = survival.copy()
    conditional[1:] /= survival[:-1]
    return conditional
