"""Plain torch reference of relaxed verification: rules, guards, budget, and the state of a request.

The rules and their sources are in `vllm_aasd.kernels.verify`.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from vllm_aasd.kernels.verify.policies import (
    ALPHA,
    BETA,
    BUDGET,
    CAP,
    CONDITIONAL,
    COOLDOWN,
    DECAY,
    EXHAUSTED,
    FLOOR,
    FLY,
    KAPPA,
    LEVEL,
    LIMIT,
    NATS,
    NUM_STATES,
    PER_STEP,
    SPENT,
    STRICT,
    STRICT_LEFT,
    THRESHOLD,
    WINDOW,
    VerifyPolicies,
)


class RowStatistics(NamedTuple):
    """What the rules need of one row of logits.

    Attributes:
        probs: [vocab_size] float32.
        argmax: the first NaN if there is one, else the lowest id of the maximum.
        entropy: float32, nats.
        top_entropy: float32, nats: -sum p log p of the three likeliest tokens, without normalizing them again.
    """

    probs: torch.Tensor
    argmax: int
    entropy: torch.Tensor
    top_entropy: torch.Tensor


def row_statistics(logits: torch.Tensor) -> RowStatistics:
    """Compute them from one row, [vocab_size]."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    top = probs.topk(min(3, len(probs))).values
    entropy, top_entropy = torch.special.entr(probs).sum(), torch.special.entr(top).sum()
    return RowStatistics(probs, int(logits.float().argmax()), entropy, top_entropy)


def binary_kl(q: float, p: float) -> float:
    """KL divergence in nats of a Bernoulli(q) from a Bernoulli(p); 0 <= q <= 1, 0 < p <= 1."""
    heads = q * math.log(q / p) if q > 0 else 0.0
    if q >= 1:
        return heads
    return heads + (1 - q) * math.log((1 - q) / (1 - p)) if p < 1 else math.inf


class Relaxation:
    """Relaxed acceptance of one request in one step; updates the request's row of the state.

    Attributes:
        exhausted: the budget ran out in this step.
        guarded: the collapse guard engaged in this step.
    """

    def __init__(
        self, policies: VerifyPolicies, i: int, is_greedy: bool, stop_token_ids: torch.Tensor, vocab_size: int
    ) -> None:
        row = int(policies.state_rows[i])
        has_state = 0 <= row < len(policies.state)
        self._state = policies.state[row] if has_state else torch.zeros(NUM_STATES)
        self._rule = int(policies.rule[i])
        if not has_state or self._rule not in (CONDITIONAL, FLY, BUDGET) or self._state[EXHAUSTED]:
            self._rule = STRICT
        self._parameters = policies.parameters[i]
        self._is_greedy = is_greedy
        self._stops = [stop for stop in stop_token_ids.tolist() if 0 <= stop < vocab_size]
        self._num_relaxed = 0
        self.exhausted = self.guarded = False

    def accepts(self, x: int, row: RowStatistics, is_strict: bool, uniform: float, following: Iterable[bool]) -> bool:
        """Whether draft token x, a token of the vocabulary, is accepted at a row although the strict rule rejects it.

        To be called at every row that is reached: a sampled request's budget pays wherever the emitted distribution
        differs from the target's, whether x is accepted or not.

        Args:
            x: the draft token.
            row: statistics of the row.
            is_strict: whether the strict rule accepts x.
            uniform: of the row; without meaning for greedy requests.
            following: of each following draft token of the request, whether the strict rule accepts it.
        """
        p = row.probs
        if self._rule == STRICT or not self._passes_guards(x, p) or self._state[STRICT_LEFT] > 0:
            return False
        if self._rule == BUDGET and self._is_greedy and self._num_relaxed >= self._parameters[PER_STEP]:
            return False
        is_candidate = not is_strict and self._clears(x, row, uniform, following)
        if self._state[LEVEL] * self._parameters[DECAY] + 1 > self._parameters[LIMIT]:
            if is_candidate:
                self.guarded = True
                # The recovered token counts as one of them.
                self._state[STRICT_LEFT] = self._parameters[COOLDOWN] + 1
            return False
        if self._rule == BUDGET:
            cost = torch.log(p.max()) - torch.log(p[x]) if self._is_greedy else -torch.log(p[x])
            if not self._is_greedy:
                cost = torch.minimum(cost, self._parameters[KAPPA])
            if (is_candidate or not self._is_greedy) and not self._pays(cost):
                return False
        self._num_relaxed += is_candidate
        return is_candidate

    def emitted(self, is_relaxed: bool) -> None:
        """Record an emitted token: accepted, recovered or bonus."""
        if self._rule != STRICT or self.exhausted:
            self._state[LEVEL] = self._state[LEVEL] * self._parameters[DECAY] + float(is_relaxed)
            self._state[STRICT_LEFT] = (self._state[STRICT_LEFT] - 1).clamp(min=0)

    def _passes_guards(self, x: int, p: torch.Tensor) -> bool:
        if x in self._stops:
            return False
        return bool(p[x] > 0 and p[x] >= self._parameters[FLOOR] and p[x] > p[self._stops].sum())

    def _clears(self, x: int, row: RowStatistics, uniform: float, following: Iterable[bool]) -> bool:
        p, parameters = row.probs, self._parameters
        if self._rule == CONDITIONAL:
            return bool(p[x] >= parameters[BETA] - parameters[ALPHA] * row.entropy or x == row.argmax)
        if self._rule == FLY:
            size = int(parameters[WINDOW])
            window = list(itertools.islice(following, size))
            return bool(row.top_entropy >= parameters[THRESHOLD] and len(window) == size and all(window))
        if self._is_greedy:
            return bool(torch.log(p.max()) - torch.log(p[x]) <= parameters[CAP])
        return bool(parameters[KAPPA] > 0 and binary_kl(uniform, float(p[x])) <= parameters[KAPPA])

    def _pays(self, cost: torch.Tensor) -> bool:
        nats = self._parameters[NATS]
        if nats > 0 and self._state[SPENT] + cost <= nats:
            self._state[SPENT] += cost
            return True
        # The first cost that doesn't fit ends the budget, even if a smaller one would still fit.
        self.exhausted = True
        self._state[EXHAUSTED] = 1
        self._rule = STRICT
        return False
