"""The verification rules: what each accepts beyond the target's own tokens, and its constants."""

import math
from typing import NamedTuple

from vllm_aasd.kernels.verify.policies import (
    ALPHA,
    BETA,
    BUDGET,
    CAP,
    CONDITIONAL,
    COOLDOWN,
    DECAY,
    FLOOR,
    FLY,
    KAPPA,
    LIMIT,
    NATS,
    NUM_PARAMETERS,
    PER_STEP,
    STRICT,
    THRESHOLD,
    WINDOW,
)

RULES = ("strict", "conditional", "fly", "budget")
"""Names of the rules, as ``aasd_verification`` takes them."""

CONDITIONAL_FLOOR = 0.3
"""Probability below which `conditional` accepts no more than strict. What a lower floor gains is copied text: at 0.1,
with alpha 0.1 and beta 0.5, 26% of the output's text was copied from the prompt; greedy decoding copies 22%."""

RELAXED_FLOOR = 0.01
"""The same for `fly` and `budget`, whose own rules are tighter in all but degenerate rows."""

GUARD_LIMIT, GUARD_MEMORY, GUARD_COOLDOWN = 1.4, 64.0, 32.0
"""The collapse guard's level limit, and its memory and cooldown in tokens: relaxed tokens are at least 59 tokens
apart."""

BUDGET_CAP, BUDGET_PER_STEP, BUDGET_KAPPA = 0.25, 2, 0.02
"""`budget`: nats of regret per relaxed token and relaxed tokens per step in greedy requests (ASD, arXiv 2608.03447);
nats of KL divergence per position in sampled ones."""


class Policy(NamedTuple):
    """How a request is verified.

    Attributes:
        rule: its number in `vllm_aasd.kernels.verify.policies`.
        parameters: the columns of `VerifyPolicies.parameters`, ``NUM_PARAMETERS`` of them.
        relaxes_sampling: whether sampled requests (temperature > 0) are relaxed too.
    """

    rule: int = STRICT
    parameters: tuple[float, ...] = (0.0,) * NUM_PARAMETERS
    relaxes_sampling: bool = False

    def relaxes(self, is_greedy: bool) -> bool:
        """Whether greedy (or sampled) requests may get tokens that strict verification rejects."""
        return self.rule != STRICT and (is_greedy or self.relaxes_sampling)


STRICT_POLICY = Policy()
"""Accept only what keeps the output distribution that of the target.

Source: Leviathan, Kalman, Matias, *Fast Inference from Transformers via Speculative Decoding*, arXiv 2211.17192, for a
draft that is certain of its token.
"""


def conditional(alpha: float, beta: float, *, relaxes_sampling: bool, collapse_guard: bool) -> Policy:
    """Accept a draft token x if the target gives it enough probability: ``p(x) >= min(beta - alpha H, max p)``.

    Source: Wang et al., *Alignment-Augmented Speculative Decoding with Alignment Sampling and Conditional
    Verification*, EMNLP 2025, arXiv 2505.13204: the bar, in the form of a public re-implementation (alpha = beta =
    0.1), since the authors published no code. As written it is unsafe: once H reaches beta / alpha, the bar is 0 or
    less and any token passes, masked ones included. From the authors' earlier CASD: the guard on stop tokens.
    Ours: the floor, p(x) > 0, the sum over several stop tokens, the collapse guard, and that sampled requests are
    strict by default.

    Args:
        alpha: how far a nat of entropy lowers the bar; larger is looser.
        beta: the bar where the target is certain; smaller is looser.
        relaxes_sampling: whether sampled requests are relaxed too.
        collapse_guard: whether the collapse guard is on, see `_relaxed`.
    """
    return _relaxed(CONDITIONAL, {ALPHA: alpha, BETA: beta}, CONDITIONAL_FLOOR, relaxes_sampling, collapse_guard)


def fly(window: int, threshold: float, *, relaxes_sampling: bool, collapse_guard: bool) -> Policy:
    """Accept a draft token where the target is undecided, if the target agrees with the draft tokens after it.

    The entropy over the three likeliest tokens (not normalized again) must be at least `threshold`, and strict
    verification must accept each of the next `window` draft tokens, which must exist.

    Source: Li et al., *Training-Free Loosely Speculative Decoding*, arXiv 2511.22972, in the form of vLLM 0.33's
    ``rejection_sample_method: "fly"``. Decisions equal vLLM's where none of our guards rejects.

    Args:
        window: draft tokens; smaller is looser.
        threshold: nats, at most log 3; smaller is looser.
        relaxes_sampling, collapse_guard: as for `conditional`.
    """
    return _relaxed(FLY, {WINDOW: window, THRESHOLD: threshold}, RELAXED_FLOOR, relaxes_sampling, collapse_guard)


def budget(nats: float, *, relaxes_sampling: bool, collapse_guard: bool) -> Policy:
    """Accept draft tokens whose loss against the target is small, as long as the request's budget lasts.

    Greedy requests: a token that isn't the argmax costs its regret, log max p - log p(x). So a request's
    log-likelihood under the target is at most `nats` below that of the target's own choices in the same contexts.

    Sampled requests: x is accepted with probability p' instead of p = p(x), the largest p' <= 1 with
    ``d(p' || p) = p' log(p' / p) + (1 - p') log((1 - p') / (1 - p)) <= BUDGET_KAPPA``. The emitted token's
    distribution then has a KL divergence of d(p' || p) from p, which the budget pays at each position; by the chain
    rule the whole output's distribution is at most `nats` from the target's.

    Sources: greedy after ASD, arXiv 2608.03447; sampled after Cactus, arXiv 2604.04987, for drafts that are certain
    of their token. Ours: the guards, and that a sampled request's divergences are summed and bounded.

    Args:
        nats: that a request may lose in all; larger is looser.
        relaxes_sampling, collapse_guard: as for `conditional`.
    """
    columns = {CAP: BUDGET_CAP, PER_STEP: BUDGET_PER_STEP, NATS: nats, KAPPA: BUDGET_KAPPA}
    return _relaxed(BUDGET, columns, RELAXED_FLOOR, relaxes_sampling, collapse_guard)


def _relaxed(
    rule: int, columns: dict[int, float], floor: float, relaxes_sampling: bool, collapse_guard: bool
) -> Policy:
    """Add the guards of every relaxed rule, which `vllm_aasd.kernels.verify` describes.

    The collapse guard (ours) makes a request strict for a while when relaxed tokens are too close to each other: each
    of them continues a copy that the target would have left, and makes the next one likelier. With every emitted token
    its level is multiplied by exp(-1 / `GUARD_MEMORY`), and with every relaxed one it rises by one.
    """
    columns = {**columns, FLOOR: floor, LIMIT: math.inf}
    if collapse_guard:
        columns |= {LIMIT: GUARD_LIMIT, DECAY: math.exp(-1 / GUARD_MEMORY), COOLDOWN: GUARD_COOLDOWN}
    return Policy(rule, tuple(columns.get(column, 0.0) for column in range(NUM_PARAMETERS)), relaxes_sampling)
