"""Conditional verification: AASD's relaxed acceptance, with guards."""

from dataclasses import dataclass

# Lowest and highest value that each parameter may take; settings take their ranges from here.
ALPHA_RANGE = (0.0, 10.0)
BETA_RANGE = (0.0, 2.0)
FLOOR_RANGE = (1e-4, 1.0)


@dataclass(frozen=True)
class ConditionalVerification:
    """Accept also a draft token to which the target gives enough probability, given its own certainty.

    With p the target's distribution after all processing (penalties, masks, and for sampled requests
    temperature, top-k and top-p) and H its entropy in nats, a draft token x that strict verification would
    reject is accepted iff all of these hold:

        p(x) >= max(floor, min(beta - alpha H, max p))
        p(x) > 0
        x is no stop token, and p(x) > sum of p over the request's stop tokens

    The output is no longer the target's own: how far it drifts is a matter of these parameters and was
    measured, see the README. alpha = 0 with beta > 1 is strict for greedy requests.

    From the paper: the bar min(beta - alpha H, max p), in the form and with the constants (both 0.1) of a
    public re-implementation, the authors having published no code. As written it is unsafe: from H = beta /
    alpha on the bar is 0 or less and any token passes, masked ones included. From the authors' earlier CASD:
    the stop tokens' guard, p > p(EOS), which keeps a copy from running on where the target would rather stop.
    Ours: the floor, p(x) > 0, the sum over several stop tokens, and that sampled requests stay strict by
    default, since always accepting the likely pulls sampling towards the draft.

    Source: Wang et al., *Alignment-Augmented Speculative Decoding with Alignment Sampling and Conditional
    Verification*, EMNLP 2025, arXiv 2505.13204.

    Attributes:
        alpha: probability per nat in [0, 10], how far a nat of entropy lowers the bar; larger is looser.
        beta: probability in [0, 2], the bar where the target is certain; smaller is looser.
        floor: probability in [0.0001, 1], below which nothing is accepted; smaller is looser.
        sampled: whether requests that sample are relaxed too.

    Raises:
        ValueError: a parameter is out of its range.
    """

    alpha: float
    beta: float
    floor: float
    sampled: bool = False

    name = "conditional"

    def __post_init__(self) -> None:
        for field, (low, high) in (("alpha", ALPHA_RANGE), ("beta", BETA_RANGE), ("floor", FLOOR_RANGE)):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field} is {value}, must lie in [{low:g}, {high:g}]")

    def relaxes(self, is_greedy: bool) -> bool:
        """Whether requests of a kind (greedy, or sampled) may get tokens that aren't strictly the target's."""
        return is_greedy or self.sampled
