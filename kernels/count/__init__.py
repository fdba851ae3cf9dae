"""Count: what became of the draft tokens of one step, added to running totals where the drafts are.

What is counted, in one vector of float64
    - Draft tokens that only a relaxed rule accepted, and their regret in nats.
    - Requests whose budget ran out, and requests whose collapse guard engaged.
    - Calibration: draft tokens by tenth of the *survival* that the drafter promised (its estimate that the token will
      be accepted), the sum of what it promised, and how many were accepted.

    Negative ids are no draft tokens: fillers, and what a grammar forbids.

How
    The V1 runner is on the host: a compiled loop. The V2 runner doesn't wait for the device, so there the totals are on
    the device, read only on demand, and the kernel that decides (`vllm_aasd.kernels.verify.decide_triton`) adds to
    them. Whole numbers below 2^53 are exact in float64 in any order of addition.
"""

import torch

from vllm_aasd.kernels.common.checks import INTEGERS, check_tensors
from vllm_aasd.kernels.verify import VerifyOutput

SURVIVAL_BINS = 10
"""Promised survival is counted by tenths; 1.0 is in the last."""

UNPROMISED = -1.0
"""Marks a draft token without a promise, which says nothing about calibration."""

RELAXED, REGRET, EXHAUSTED, GUARDED, SURVIVAL_TOKENS = range(5)
SURVIVAL_PROMISED = SURVIVAL_TOKENS + SURVIVAL_BINS
SURVIVAL_ACCEPTED = SURVIVAL_PROMISED + SURVIVAL_BINS
SIZE = SURVIVAL_ACCEPTED + SURVIVAL_BINS
"""The totals: four numbers, and three by tenth of survival; each name is the first index."""


def strict_output(num_sampled: torch.Tensor, num_rows: int) -> VerifyOutput:
    """What `count_drafts` needs of a step that vLLM's own sampler has verified, which is strict."""
    device = num_sampled.device
    relaxed = torch.zeros(num_rows, dtype=torch.bool, device=device)
    no_events = torch.zeros(len(num_sampled), dtype=torch.bool, device=device)
    return VerifyOutput(num_sampled, num_sampled, relaxed, relaxed.float(), no_events, no_events)


def count_drafts(
    totals: torch.Tensor,
    draft_token_ids: torch.Tensor,
    cu_num_rows: torch.Tensor,
    first_draft: int,
    idx_mapping: torch.Tensor,
    survival: torch.Tensor,
    output: VerifyOutput,
) -> None:
    """Add one step to the totals, on the CPU; the module's docstring says what is counted.

    Args:
        totals: [SIZE] float64, modified in place; the constants of this module are the indices.
        draft_token_ids: [num_rows] integer, by row; negative ids are no draft tokens, and come after a request's.
        cu_num_rows: [num_reqs + 1] integer: request i owns the rows from entry i up to entry i + 1.
        first_draft: which of a request's rows has its first draft token: 1 if the first row has the token emitted
            last, as `verify_seeded` takes them; 0 if rows are drafts only, as `verify` takes them.
        idx_mapping: [num_reqs] integer, the row of `survival` of each request.
        survival: [>= 1, K] float32, rows contiguous: probabilities promised when the draft was made; `UNPROMISED` where
            there is no promise. A request's first K draft tokens are counted.
        output: of the verify op; `sampled` isn't read. A row's `relaxed` and `regret` are of the draft token that it
            tested, which stands `first_draft` rows later.

    Raises:
        ValueError: an argument has a wrong shape or dtype. Values are not checked.
    """
    by_row, by_request = draft_token_ids.shape, output.num_sampled.shape
    check_tensors(
        ("totals", totals, (SIZE,), torch.float64),
        ("draft_token_ids", draft_token_ids, by_row, *INTEGERS),
        ("cu_num_rows", cu_num_rows, (by_request[0] + 1,), *INTEGERS),
        ("idx_mapping", idx_mapping, by_request, *INTEGERS),
        ("survival", survival, (survival.shape[0], survival.shape[-1]), torch.float32),
        ("relaxed", output.relaxed, by_row, torch.bool),
        ("regret", output.regret, by_row, torch.float32),
        ("exhausted", output.exhausted, by_request, torch.bool),
        ("guarded", output.guarded, by_request, torch.bool),
    )
    # Not at import: the GPU path does without numba.
    from vllm_aasd.kernels.count import cpu

    cpu.count_drafts(totals, draft_token_ids, cu_num_rows, first_draft, idx_mapping, survival, output)
