"""A device that is no device: what steps of equal width emit and take, drawn at random."""

import numpy as np


class Device:
    """Accepts draft tokens by chance, and takes a time that grows with the positions of a step.

    Args:
        first: chance that a request's first draft token is accepted.
        further: chance of each further one, where all before it were.
        cost: what a position takes, as a share of a step without drafts.
        hiccups: share of steps that take three times as long.
    """

    def __init__(self, first: float, further: float, cost: float, hiccups: float = 0.01, seed: int = 0) -> None:
        self.first, self.further, self.cost, self.hiccups = first, further, cost, hiccups
        self._rng = np.random.default_rng(seed)

    def accepted(self, num_requests: int, width: int) -> list[int]:
        """Of each request, draft tokens accepted."""
        if width == 0:
            return []
        chances = [self.first, *[self.further] * (width - 1)]
        is_accepted = self._rng.random((num_requests, width)) < chances
        return is_accepted.cumprod(axis=1).sum(axis=1).tolist()

    def seconds(self, num_requests: int, width: int) -> float:
        """What a step takes."""
        noise = np.exp(0.02 * self._rng.standard_normal()) * (3 if self._rng.random() < self.hiccups else 1)
        return float(1e-2 * (1 + self.cost * num_requests * width) * noise)

    def speed_up(self, num_requests: int, width: int) -> float:
        """Of a width that stays, in the mean, over none."""
        emitted = 1 + sum(self.first * self.further**at for at in range(width))
        return emitted / (1 + self.cost * num_requests * width)
