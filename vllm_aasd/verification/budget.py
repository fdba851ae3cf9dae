"""Budget: a loss that is bounded, per token, per step and per request."""

from dataclasses import dataclass

from vllm_aasd.kernels.verify.policies import BUDGET, CAP, KAPPA, NATS, PER_STEP
from vllm_aasd.verification.policy import RelaxedPolicy


@dataclass(frozen=True)
class BudgetVerification(RelaxedPolicy):
    """Accept also draft tokens whose loss against the target is small, as long as the request's budget lasts.

    Greedy requests: a draft token x that isn't the argmax costs its regret, log max p - log p(x). It is accepted
    under the guards of `RelaxedPolicy` iff regret <= `cap`, fewer than `per_step` tokens of this step were relaxed,
    and the request's budget still pays for it. So a request's log-likelihood under the target is at most `nats` below
    what the target's own choices, given the same context each, would have had.

    Sampled requests: x is accepted with probability p' instead of p = p(x), the largest p' <= 1 with

        d(p' || p) = p' log(p' / p) + (1 - p') log((1 - p') / (1 - p)) <= kappa

    and otherwise a token is drawn from p without x, as ever. The emitted token then has the law q that is p' at x and
    p scaled by (1 - p') / (1 - p) elsewhere, so that KL(q || p) = d(p' || p) <= kappa. p' needs no computing: as d
    grows with p' above p, a uniform u is at most p' iff u <= p or d(u || p) <= kappa. The budget pays
    d(p' || p) = min(kappa, -log p) wherever the law was another than the target's, whatever came of it; by the chain
    rule the law of a request's whole output has then at most `nats` of KL divergence to the target's.

    The budget never refills. What it can't pay ends it: the request is strict from there on. `nats` = 0 is strict,
    for both kinds of request; `kappa` = 0 and `per_step` = 0 are for theirs.

    Sources: greedy after ASD, arXiv 2608.03447 (cap 0.25 nats, 2 mismatches a block, 2.0 nats a request); sampled
    after Cactus, arXiv 2604.04987, for drafts that are certain of their token. Deviations: the guards; that a sampled
    request's divergences are summed and bounded too is ours.

    Attributes:
        cap: nats in [0, 20] of a relaxed token in greedy requests; larger is looser.
        per_step: the most relaxed tokens of a step in greedy requests, in [0, 128].
        nats: of a request, in [0, 10000].
        kappa: nats in [0, 20] of a position in sampled requests; larger is looser.
    """

    cap: float
    per_step: int
    nats: float
    kappa: float

    name = "budget"
    rule = BUDGET
    ranges = {"cap": (0.0, 20.0), "per_step": (0, 128), "nats": (0.0, 10000.0), "kappa": (0.0, 20.0)}

    def _columns(self) -> dict[int, float]:
        return {CAP: self.cap, PER_STEP: self.per_step, NATS: self.nats, KAPPA: self.kappa}
