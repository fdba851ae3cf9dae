"""Count: what became of the drafts of one step, added to running totals where the drafts are.

What is counted, in one vector of float64
    - Draft tokens that only a relaxed policy accepted, and their regret in nats.
    - Requests whose budget ran out, and requests whose collapse guard engaged.
    - Calibration: draft tokens by tenth of the *survival* that the drafter promised (its estimate that the token will
      be accepted), the sum of what it promised, and how many were accepted. A calibrated drafter keeps its promises.

    A draft token is one whose id isn't negative: neither fillers nor what a grammar forbade are counted.

How
    The V1 runner is on the host: a compiled loop. The V2 runner is ahead of the device and never waits for it, so
    there the totals are on the device: one launch of a few atomic additions, read only on demand. Whole numbers below
    2^53 are exact in float64, in whatever order they are added.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_tensor

SURVIVAL_BINS = 10
"""Promised survival is told apart by tenths; 1.0 is in the last."""

UNPROMISED = -1.0
"""Stands where no survival was promised: such a token says nothing about calibration."""

RELAXED, REGRET, EXHAUSTED, GUARDED, SURVIVAL_TOKENS = range(5)
SURVIVAL_PROMISED = SURVIVAL_TOKENS + SURVIVAL_BINS
SURVIVAL_ACCEPTED = SURVIVAL_PROMISED + SURVIVAL_BINS
SIZE = SURVIVAL_ACCEPTED + SURVIVAL_BINS
"""The totals: four numbers, and three by tenth of survival; each name is the first index."""


def count_drafts(
    totals: torch.Tensor,
    draft_token_ids: torch.Tensor,
    cu_num_rows: torch.Tensor,
    first_draft: int,
    num_emitted: torch.Tensor,
    idx_mapping: torch.Tensor,
    survival: torch.Tensor,
    relaxed: torch.Tensor,
    regret: torch.Tensor,
    exhausted: torch.Tensor,
    guarded: torch.Tensor,
) -> None:
    """Add one step to the totals without waiting for the device; the module's docstring says what is counted.

    Args:
        totals: [SIZE] float64, modified in place; the constants of this module are the indices.
        draft_token_ids: [num_rows] integer, by row; negative ids are no drafts, and come after a request's drafts.
        cu_num_rows: [num_reqs + 1] integer: request i owns the rows from entry i up to entry i + 1.
        first_draft: which of a request's rows holds its first draft token: 1 where the first row holds the token
            emitted last, as `verify_seeded` takes them; 0 where rows are drafts only, as `verify` takes them.
        num_emitted: [num_reqs] integer: accepted draft tokens, and one more.
        idx_mapping: [num_reqs] integer, the row of `survival` of each request.
        survival: [>= 1, K] float32, rows contiguous: probabilities promised when the draft was made; `UNPROMISED` where
            there is no promise. A request's first K draft tokens are counted.
        relaxed: [num_rows] bool, by the row that tested the draft: `first_draft` rows before the draft's.
        regret: [num_rows] float32, nats, by the same row.
        exhausted: [num_reqs] bool, whether the budget of a request's policy ran out in this step.
        guarded: [num_reqs] bool, whether the collapse guard engaged in this step.

    Raises:
        ValueError: an argument has a wrong shape or dtype. Values are not checked.
    """
    by_row, by_request = (draft_token_ids.shape[0],), (num_emitted.shape[0],)
    for name, tensor, shape, dtypes in (
        ("totals", totals, (SIZE,), (torch.float64,)),
        ("draft_token_ids", draft_token_ids, by_row, (torch.int32, torch.int64)),
        ("cu_num_rows", cu_num_rows, (by_request[0] + 1,), (torch.int32, torch.int64)),
        ("idx_mapping", idx_mapping, by_request, (torch.int32, torch.int64)),
        ("survival", survival, (survival.shape[0], survival.shape[-1]), (torch.float32,)),
        ("relaxed", relaxed, by_row, (torch.bool,)),
        ("regret", regret, by_row, (torch.float32,)),
        ("exhausted", exhausted, by_request, (torch.bool,)),
        ("guarded", guarded, by_request, (torch.bool,)),
    ):
        check_tensor(name, tensor, shape, *dtypes)
    step = draft_token_ids, cu_num_rows, first_draft, num_emitted, idx_mapping, survival
    _implementation(totals.device.type).count_drafts(totals, *step, relaxed, regret, exhausted, guarded)


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.count import triton

        return triton
    from vllm_aasd.kernels.count import cpu

    return cpu
