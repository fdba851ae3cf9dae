"""How far the survival that the drafter estimates holds for one request, learned from its own verifications."""

import math

import numpy as np

_RATE = 0.03
_LOWEST, _HIGHEST = 0.3, 1.1
# Per step without a draft: after 40 of them two thirds of the correction are gone, and drafting is tried again.
_FORGETTING = 0.03


class AcceptanceCalibration:
    """One scale on the probability of each draft token, near 1 where the estimate holds.

    A request whose drafts keep failing ends with survivals that are worth no step time, and so stops paying
    for them; while it drafts nothing, the scale drifts back to 1, and it is tried again.

    Attributes:
        scale: of the probability that a draft token is accepted, given that those before it were.
    """

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0

    def apply(self, survival: np.ndarray) -> np.ndarray:
        """The survival to be expected of a draft.

        Args:
            survival: ``[n]`` float32, as estimated.

        Returns:
            ``[n]`` float32, of the drafter's estimate and this request's record, at most 1.
        """
        # Plain numbers: a draft is short, and each operation of numpy's costs more than all of this.
        scale, product = self.scale, 1.0
        expected = np.empty(len(survival), np.float32)
        for position, conditional in enumerate(_conditional(survival)):
            product *= min(conditional * scale, 1.0)
            expected[position] = product
        return expected

    def observe(self, survival: np.ndarray, num_accepted: int) -> None:
        """Learn from the verification of a draft.

        Args:
            survival: ``[n]``, what was expected of it (`apply`); n = 0 for a step without a draft.
            num_accepted: how many of its tokens were accepted.
        """
        if not len(survival):
            self.scale += _FORGETTING * (1.0 - self.scale)
            return
        expected = sum(_conditional(survival[: num_accepted + 1]))
        scale = self.scale * math.exp(_RATE * (num_accepted - expected))
        self.scale = min(max(scale, _LOWEST), _HIGHEST)


def _conditional(survival: np.ndarray) -> list[float]:
    """The probability of each token given those before it, from that of all up to it."""
    values = survival.tolist()
    return [value / before for value, before in zip(values, [1.0, *values], strict=False)]
