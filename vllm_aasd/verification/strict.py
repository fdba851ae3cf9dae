"""Strict verification: the output is the target's own."""

from dataclasses import dataclass

from vllm_aasd.kernels.verify.policies import STRICT
from vllm_aasd.verification.policy import Policy


@dataclass(frozen=True)
class StrictVerification(Policy):
    """Accept what the target itself would have emitted.

    Greedy requests: a draft token is accepted iff it is the target's argmax, so the output is that of greedy
    decoding. Sampled requests: iff p(x) >= u for a uniform u, a rejection being redrawn from p without x, so
    the output has exactly the target's distribution.

    Source: Leviathan, Kalman, Matias, *Fast Inference from Transformers via Speculative Decoding*,
    arXiv 2211.17192, for a proposal that is certain of its token.
    """

    name = "strict"
    rule = STRICT
