"""How each request of a batch is verified, in tensors: its rule with parameters and guards, and its state.

`vllm_aasd.kernels.verify` describes the rules, and `vllm_aasd.verification` fills these tensors.
"""

from typing import NamedTuple

import torch

STRICT, CONDITIONAL, FLY, BUDGET = range(4)
"""The rules, by their number in `VerifyPolicies.rule`."""

MAX_STOP_TOKEN_IDS = 64
"""The most stop token ids of a relaxed request: the width of the tables that hold them. A request can have any number,
but neither shared memory nor a kernel may grow with it. One with more is verified strictly, which needs none."""

NUM_PARAMETERS = 8
# Columns of `VerifyPolicies.parameters`: four that depend on the rule,
ALPHA, BETA = 0, 1
WINDOW, THRESHOLD = 0, 1
CAP, PER_STEP, NATS, KAPPA = 0, 1, 2, 3
# and those of the guards.
FLOOR, LIMIT, DECAY, COOLDOWN = 4, 5, 6, 7

NUM_STATES = 4
# Columns of `VerifyPolicies.state`.
SPENT, LEVEL, STRICT_LEFT, EXHAUSTED = 0, 1, 2, 3


class VerifyPolicies(NamedTuple):
    """How each request is verified; n is the batch's size, or the number of request indices in the seeded op."""

    rule: torch.Tensor
    """[n] int32: one of the rules above; any other number is strict."""
    parameters: torch.Tensor
    """[n, NUM_PARAMETERS] float32. Four columns depend on the rule:

    - conditional: alpha, probability per nat; beta, probability;
    - fly: window, draft tokens; threshold, nats of the three likeliest tokens' entropy;
    - budget: cap, nats of regret per relaxed token; most relaxed tokens per step; nats per request; kappa, nats of
      KL divergence per position. Cap and the most per step are those of greedy requests, kappa of sampled ones.

    Four are guards: floor, the probability below which nothing is relaxed; and of the collapse guard the limit of
    the level (infinite: no guard), the share of the level that is left after each emitted token, in [0, 1], and the
    cooldown, for how many tokens the request is strict after the limit was reached.
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
