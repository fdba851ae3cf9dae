"""FLy: a mismatch is forgiven if the target is undecided there and agrees with what follows."""

from dataclasses import dataclass

from vllm_aasd.kernels.verify.policies import FLY, THRESHOLD, WINDOW
from vllm_aasd.verification.policy import RelaxedPolicy


@dataclass(frozen=True)
class FlyVerification(RelaxedPolicy):
    """Accept also a draft token at which the target is undecided, if it would have gone on the same way after it.

    With p the target's distribution, a draft token x that strict verification would reject is accepted under the
    guards of `RelaxedPolicy` iff

        -sum p log p over the three likeliest tokens >= threshold        (the entropy gate)
        the `window` draft tokens after x are all there, and strict verification accepts each    (the window)

    A second mismatch in the window thus rejects the first retroactively, and so does the draft's end.

    Source: Li et al., *Training-Free Loosely Speculative Decoding: Accepting Semantically Correct Drafts Beyond
    Exact Match*, arXiv 2511.22972; this form of it is vLLM 0.33's ``rejection_sample_method: "fly"``, with its
    constants: a window of min(6, num_speculative_tokens - 1), a threshold of 0.3 nats, entropy over three
    probabilities that aren't normalised again. Decisions equal vLLM's where no guard of ours refuses.

    Attributes:
        window: draft tokens in [1, 127]; smaller is looser.
        threshold: nats in [0, 1.1], where 1.0986 is the most that three tokens can have; smaller is looser.
    """

    window: int
    threshold: float

    name = "fly"
    rule = FLY
    ranges = {"window": (1, 127), "threshold": (0.0, 1.1)}

    def _columns(self) -> dict[int, float]:
        return {WINDOW: self.window, THRESHOLD: self.threshold}
