"""How far the survival that the drafter estimates holds, learned from verifications: of all requests, and of each."""

import math

import numpy as np

_RATE = 0.03
_LOWEST, _HIGHEST = 0.3, 1.1
# Per step without a draft: after 40 of them two thirds of the correction are gone, and drafting is tried again.
_FORGETTING = 0.03

_USUAL_RATE = 0.01
_LEAST_EXPONENT, _MOST_EXPONENT = 0.5, 4.0


class UsualAcceptance:
    """How the estimate usually holds, for requests of one kind: of its tokens, ``p ** exponent`` are accepted.

    The constants of the mixture were fitted on greedy answers of one model. Of another, or of samples at a temperature,
    more or fewer draft tokens are accepted; but those that are nearly certain stay so, as under an exponent.

    Attributes:
        exponents: for tokens from the own context, and from known text.
    """

    __slots__ = ("exponents",)

    def __init__(self) -> None:
        self.exponents = [1.0, 1.0]

    def learn(self, kind: int, surplus: float) -> None:
        """Learn from a draft: the accepted tokens of a kind, less those that were expected."""
        exponent = self.exponents[kind] * math.exp(-_USUAL_RATE * surplus)
        self.exponents[kind] = min(max(exponent, _LEAST_EXPONENT), _MOST_EXPONENT)


class AcceptanceCalibration:
    """Two scales on the probability of each draft token, near 1 where the estimate holds.

    One is for tokens drafted from the request's own context, one for those that known text goes on with: a request may
    copy one and not the other. A request whose drafts keep failing ends with survivals that are worth no step time, and
    so stops paying for them; while it drafts nothing, the scales drift back to 1, and it is tried again.

    Args:
        usual: of requests like this one, which it adds to; None if its drafts may depend on no other request.

    Attributes:
        scales: of the probability that a draft token is accepted, given that those before it were: from the own
            context, and from known text.
    """

    __slots__ = ("_usual", "scales")

    def __init__(self, usual: UsualAcceptance | None = None) -> None:
        self._usual = usual
        self.scales = [1.0, 1.0]

    def apply(self, survival: np.ndarray, is_known: np.ndarray) -> np.ndarray:
        """The survival to be expected of a draft.

        Args:
            survival: ``[n]`` float32, as estimated.
            is_known: ``[>= n]`` bool, the tokens that known text goes on with.

        Returns:
            ``[n]`` float32, of the drafter's estimate and this request's record, at most 1.
        """
        # Plain numbers: a draft is short, and each operation of numpy's costs more than all of this.
        scales, product = self.scales, 1.0
        exponents = self._usual.exponents if self._usual is not None else (1.0, 1.0)
        expected = np.empty(len(survival), np.float32)
        kinds = is_known.tolist()
        for position, conditional in enumerate(_conditional(survival)):
            kind = kinds[position]
            product *= min(conditional ** exponents[kind] * scales[kind], 1.0)
            expected[position] = product
        return expected

    def observe(self, survival: np.ndarray, is_known: np.ndarray, num_accepted: int) -> None:
        """Learn from the verification of a draft.

        Args:
            survival: ``[n]``, what was expected of it (`apply`); n = 0 for a step without a draft.
            is_known: ``[>= n]`` bool, as for `apply`.
            num_accepted: how many of its tokens were accepted.
        """
        if not len(survival):
            self.scales = [scale + _FORGETTING * (1.0 - scale) for scale in self.scales]
            return
        surplus = [0.0, 0.0]
        kinds = is_known.tolist()
        for position, conditional in enumerate(_conditional(survival[: num_accepted + 1])):
            surplus[kinds[position]] += (position < num_accepted) - conditional
        for kind, error in enumerate(surplus):
            self.scales[kind] = min(max(self.scales[kind] * math.exp(_RATE * error), _LOWEST), _HIGHEST)
            if self._usual is not None:
                self._usual.learn(kind, error)


def _conditional(survival: np.ndarray) -> list[float]:
    """The probability of each token given those before it, from that of all up to it."""
    values = survival.tolist()
    return [value / before for value, before in zip(values, [1.0, *values], strict=False)]
