"""What all verification policies have in common, and the guards that stand under every relaxed one."""

import math
from dataclasses import dataclass
from typing import ClassVar

from vllm_aasd.kernels.verify.policies import COOLDOWN, DECAY, FLOOR, LIMIT, NUM_PARAMETERS

# Lowest and highest value that each parameter may take; settings take their ranges from here.
FLOOR_RANGE = (1e-4, 1.0)
GUARD_LIMIT_RANGE = (1.0, 100.0)
GUARD_MEMORY_RANGE = (1.0, 10000.0)
GUARD_COOLDOWN_RANGE = (0.0, 10000.0)


def check_range(name: str, value: float, within: tuple[float, float]) -> None:
    """Raise ValueError unless a parameter lies in its range, ends included."""
    low, high = within
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, must lie in [{low:g}, {high:g}]")


@dataclass(frozen=True)
class CollapseGuard:
    """Sends a request to strict verification for a while when relaxed tokens come too close to each other.

    A loose rule's gain is for the most part the model being led into a copy of its prompt or of its own output: each
    relaxed token keeps the copy going where the target would have left it, and makes the next one likelier. So each
    request has a level that every relaxed token raises by one and every emitted token lowers to a share:

        level <- level * exp(-1 / memory) + (1 if the token was relaxed else 0)

    A relaxed acceptance that would lift the level above `limit` doesn't take place, and the request is strict for the
    next `cooldown` tokens, in which the target's own choices stand alone. At a limit of 1.4 and a memory of 64 a
    second relaxed token passes from 59 tokens behind the first on.

    Ours. That it prevents the collapse, and at what price, was measured: see the README.

    Attributes:
        limit: relaxed tokens in [1, 100], above which the level doesn't rise.
        memory: tokens in [1, 10000], in which the level falls to a share of 1/e.
        cooldown: tokens in [0, 10000], for which the request is strict.

    Raises:
        ValueError: a parameter is out of its range.
    """

    limit: float
    memory: float
    cooldown: float

    def __post_init__(self) -> None:
        check_range("limit", self.limit, GUARD_LIMIT_RANGE)
        check_range("memory", self.memory, GUARD_MEMORY_RANGE)
        check_range("cooldown", self.cooldown, GUARD_COOLDOWN_RANGE)


class Policy:
    """How a request is verified. A policy is a frozen dataclass of its parameters that says these things of itself."""

    name: ClassVar[str]
    """As settings call it."""
    rule: ClassVar[int]
    """Its number in `vllm_aasd.kernels.verify.policies`."""
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    """By parameter, the lowest and the highest value."""

    def relaxes(self, is_greedy: bool) -> bool:
        """Whether requests of a kind (greedy, or sampled) may get tokens that aren't strictly the target's."""
        return False

    def parameters(self) -> list[float]:
        """The columns of `VerifyPolicies.parameters`, ``NUM_PARAMETERS`` of them."""
        return [0.0] * NUM_PARAMETERS


@dataclass(frozen=True, kw_only=True)
class RelaxedPolicy(Policy):
    """A policy that accepts more than the strict rule, under guards.

    Whatever the rule says, a draft token x that strict verification rejects is accepted only if
    p(x) >= `floor`; p(x) > 0; x is no stop token and p(x) > sum of p over the request's stop tokens, so that no copy
    runs on where the target would rather stop; and the collapse guard lets it pass. p is the target's distribution
    after all processing (penalties, masks, and for sampled requests temperature, top-k and top-p).

    Attributes:
        floor: probability in [0.0001, 1], below which nothing is accepted; smaller is looser.
        sampled: whether requests that sample are relaxed too.
        collapse_guard: None for none.

    Raises:
        ValueError: a parameter is out of its range.
    """

    floor: float
    sampled: bool = False
    collapse_guard: CollapseGuard | None = None

    def __post_init__(self) -> None:
        for name, within in {**self.ranges, "floor": FLOOR_RANGE}.items():
            check_range(name, getattr(self, name), within)

    def relaxes(self, is_greedy: bool) -> bool:
        """Whether requests of a kind (greedy, or sampled) may get tokens that aren't strictly the target's."""
        return is_greedy or self.sampled

    def parameters(self) -> list[float]:
        """The columns of `VerifyPolicies.parameters`."""
        columns = {**self._columns(), FLOOR: self.floor, LIMIT: math.inf}
        if self.collapse_guard is not None:
            columns[LIMIT] = self.collapse_guard.limit
            columns[DECAY] = math.exp(-1 / self.collapse_guard.memory)
            columns[COOLDOWN] = self.collapse_guard.cooldown
        return [columns.get(column, 0.0) for column in range(NUM_PARAMETERS)]

    def _columns(self) -> dict[int, float]:
        """The rule's own columns."""
        raise NotImplementedError
