"""Strict verification: the output is the target's own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StrictVerification:
    """Accept what the target itself would have emitted.

    Greedy requests: a draft token is accepted iff it is the target's argmax, so the output is that of greedy
    decoding. Sampled requests: iff p(x) >= u for a uniform u, a rejection being redrawn from p without x, so
    the output has exactly the target's distribution.

    Source: Leviathan, Kalman, Matias, *Fast Inference from Transformers via Speculative Decoding*,
    arXiv 2211.17192, for a proposal that is certain of its token.
    """

    name = "strict"

    def relaxes(self, is_greedy: bool) -> bool:
        """Whether requests of a kind (greedy, or sampled) may get tokens that aren't strictly the target's."""
        return False
