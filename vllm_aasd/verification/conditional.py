"""Conditional verification: AASD's relaxed acceptance, with guards."""

from dataclasses import dataclass

from vllm_aasd.kernels.verify.policies import ALPHA, BETA, CONDITIONAL
from vllm_aasd.verification.policy import RelaxedPolicy


@dataclass(frozen=True)
class ConditionalVerification(RelaxedPolicy):
    """Accept also a draft token to which the target gives enough probability, given its own certainty.

    With p the target's distribution and H its entropy in nats, a draft token x that strict verification would
    reject is accepted under the guards of `RelaxedPolicy` iff

        p(x) >= min(beta - alpha H, max p)

    The output is no longer the target's own: how far it drifts is a matter of these parameters and was
    measured, see the README. alpha = 0 with beta > 1 is strict for greedy requests.

    From the paper: the bar min(beta - alpha H, max p), in the form and with the constants (both 0.1) of a
    public re-implementation, the authors having published no code. As written it is unsafe: from H = beta /
    alpha on the bar is 0 or less and any token passes, masked ones included. From the authors' earlier CASD:
    the stop tokens' guard, p > p(EOS), which keeps a copy from running on where the target would rather stop.
    Ours: the floor, p(x) > 0, the sum over several stop tokens, the collapse guard, and that sampled requests
    stay strict by default, since always accepting the likely pulls sampling towards the draft.

    Source: Wang et al., *Alignment-Augmented Speculative Decoding with Alignment Sampling and Conditional
    Verification*, EMNLP 2025, arXiv 2505.13204.

    Attributes:
        alpha: probability per nat in [0, 10], how far a nat of entropy lowers the bar; larger is looser.
        beta: probability in [0, 2], the bar where the target is certain; smaller is looser.
    """

    alpha: float
    beta: float

    name = "conditional"
    rule = CONDITIONAL
    ranges = {"alpha": (0.0, 10.0), "beta": (0.0, 2.0)}

    def _columns(self) -> dict[int, float]:
        return {ALPHA: self.alpha, BETA: self.beta}
