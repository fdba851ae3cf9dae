"""How each request of a batch is verified, in tensors: rules, their parameters, guards, and what is remembered.

The rules themselves are in `vllm_aasd.kernels.verify`; the policies that fill these tensors, with their ranges and
sources, in `vllm_aasd.verification`. Numbers and columns stand here once, for the references and every compiled path.
"""

from typing import NamedTuple

import torch

STRICT, CONDITIONAL, FLY, BUDGET = range(4)
"""The rules, by their number in `VerifyPolicies.rule`."""

MAX_STOP_TOKEN_IDS = 64
"""Stop token ids of a relaxed request at most: the width of the tables that hold them. A request may come with any
number, and neither memory that requests share nor a kernel may grow with it: one with more is verified strictly, which
doesn't look at them."""

NUM_PARAMETERS = 8
# Columns of `VerifyPolicies.parameters`: four that mean something else by rule,
ALPHA, BETA = 0, 1
WINDOW, THRESHOLD = 0, 1
CAP, PER_STEP, NATS, KAPPA = 0, 1, 2, 3
# and those of the guards.
FLOOR, LIMIT, DECAY, COOLDOWN = 4, 5, 6, 7

NUM_STATES = 4
# Columns of `VerifyPolicies.state`.
SPENT, LEVEL, STRICT_LEFT, EXHAUSTED = 0, 1, 2, 3


class VerifyPolicies(NamedTuple):
    """How each request is verified; n is the batch's size, or the number of request slots in the seeded op."""

    rule: torch.Tensor
    """[n] int32: one of the rules above; any other number is strict."""
    parameters: torch.Tensor
    """[n, NUM_PARAMETERS] float32. Four columns depend on the rule:

    - conditional: alpha, probability per nat; beta, probability;
    - fly: window, draft tokens; threshold, nats of the three likeliest tokens' entropy;
    - budget: cap, nats of regret per relaxed token; most relaxed tokens per step; nats per request; kappa, nats of
      KL divergence per position. Cap and the most per step are those of greedy requests, kappa of sampled ones.

    Four are guards: floor, the probability below which nothing is relaxed; and of the collapse guard the limit of
    the level (infinite: no guard), what of the level is left after each emitted token, in [0, 1], and for how many
    tokens the request is strict once the limit was met.
    """
    state_rows: torch.Tensor
    """[n] int32: each request's row of `state`. A request without one (any number that is no row) is strict."""
    state: torch.Tensor
    """[m, NUM_STATES] float32, read and updated in place; zeros for a new request: nats spent of the budget, level of
    the collapse guard, tokens for which the request stays strict, and 1 once the budget has run out."""


def policy_tensors(policies: VerifyPolicies, n: int) -> list[tuple[str, torch.Tensor, tuple[int, ...], torch.dtype]]:
    """Name, tensor, and the shape and dtype that it must have for n requests, of each of the policies' tensors."""
    num_states = policies.state.shape[0] if policies.state.ndim else 0
    return [
        ("policies.rule", policies.rule, (n,), torch.int32),
        ("policies.parameters", policies.parameters, (n, NUM_PARAMETERS), torch.float32),
        ("policies.state_rows", policies.state_rows, (n,), torch.int32),
        ("policies.state", policies.state, (num_states, NUM_STATES), torch.float32),
    ]
