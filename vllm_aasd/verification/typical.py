"""Typical acceptance: Medusa's."""

from dataclasses import dataclass

from vllm_aasd.kernels.verify.policies import DELTA, EPSILON, TYPICAL
from vllm_aasd.verification.policy import RelaxedPolicy


@dataclass(frozen=True)
class TypicalVerification(RelaxedPolicy):
    """Accept also a draft token that isn't much less likely than a typical token of the target's distribution.

    With p the target's distribution and H its entropy in nats, a draft token x that strict verification would
    reject is accepted under the guards of `RelaxedPolicy` iff

        p(x) > min(epsilon, delta exp(-H))

    exp(-H) being the probability of a token of a uniform choice as undecided as the target's.

    Source: Cai et al., *Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads*,
    arXiv 2401.10774, section 2.3.1; epsilon 0.09 and delta 0.3 are the published code's defaults. Deviations: the
    argmax is always accepted in greedy requests (Medusa emits the first token greedily and judges the others by the
    bar alone); what is rejected is replaced as under strict verification; the guards.

    Attributes:
        epsilon: probability in [0, 1], above which everything is accepted; smaller is looser.
        delta: in [0, 1], the share of a typical token's probability; smaller is looser.
    """

    epsilon: float
    delta: float

    name = "typical"
    rule = TYPICAL
    ranges = {"epsilon": (0.0, 1.0), "delta": (0.0, 1.0)}

    def _columns(self) -> dict[int, float]:
        return {EPSILON: self.epsilon, DELTA: self.delta}
