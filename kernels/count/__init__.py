"""Count: what became of the drafts of one step, added to running totals where the drafts are.

What is counted
    For each request of a step with d draft tokens, of which a were accepted, into one vector of float64, `totals`:

    - 1 where the budget of its policy ran out, and 1 where the collapse guard engaged;
    - its drafts (1 if d > 0), d, a, the tokens accepted only thanks to a relaxed policy, and their regret in nats;
    - 1 under the draft length d, so that lengths make a histogram;
    - how far the *survival* held that was promised of each draft token (see `vllm_aasd.drafting`): by tenths of it,
      the tokens, the sum of what was promised, and those accepted. Of a calibrated drafter the two last are equal.

    A draft token is one whose id isn't negative: neither fillers nor what a grammar forbade count.

How
    The V1 runner is on the host: a compiled loop. The V2 runner is ahead of the device and never waits for it, so there the
    totals are the device's, added to by one launch of a few atomic additions, and read only by whoever wants to know.
    Whole numbers below 2^53 are exact in float64, in whatever order they are added.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_shape
from vllm_aasd.kernels.count.reference import (
    ACCEPTED,
    DRAFT_TOKENS,
    DRAFTS,
    EXHAUSTED,
    GUARDED,
    LENGTHS,
    MAX_DRAFT_TOKENS,
    REGRET,
    RELAXED,
    SIZE,
    SURVIVAL_ACCEPTED,
    SURVIVAL_BINS,
    SURVIVAL_PROMISED,
    SURVIVAL_TOKENS,
    UNPROMISED,
)

__all__ = [
    "ACCEPTED",
    "DRAFTS",
    "DRAFT_TOKENS",
    "EXHAUSTED",
    "GUARDED",
    "LENGTHS",
    "MAX_DRAFT_TOKENS",
    "REGRET",
    "RELAXED",
    "SIZE",
    "SURVIVAL_ACCEPTED",
    "SURVIVAL_BINS",
    "SURVIVAL_PROMISED",
    "SURVIVAL_TOKENS",
    "UNPROMISED",
    "count_drafts",
]


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
    """Add one step to the totals, without a word to the host; the module's docstring says what is counted.

    Args:
        totals: [SIZE] float64, modified in place; the constants of this module are the places in it.
        draft_token_ids: [num_rows] integer, by row; negative ids are no drafts. Drafts come before what isn't.
        cu_num_rows: [num_reqs + 1] integer: request i owns the rows from entry i up to entry i + 1.
        first_draft: which of a request's rows holds its first draft token: 1 where the first row holds the token
            emitted last, as `verify_seeded` takes them; 0 where rows are drafts only, as `verify` takes them.
        num_emitted: [num_reqs] integer: accepted draft tokens, and one more.
        idx_mapping: [num_reqs] integer, the row of `survival` of each request.
        survival: [>= 1, K] float32, probabilities as promised when the draft was made; `UNPROMISED` where nothing
            was, and so for a draft token beyond K.
        relaxed: [num_rows] bool, by the row that tested the draft: `first_draft` rows before the draft's.
        regret: [num_rows] float32, nats, likewise.
        exhausted: [num_reqs] bool, whether the budget of a request's policy ran out in this step; [0] for policies
            without one.
        guarded: [num_reqs] bool, whether the collapse guard engaged in this step; [0] where there is none.

    Raises:
        ValueError: an argument has a wrong shape or dtype. Values are not checked; a request has at most
            `MAX_DRAFT_TOKENS` drafts.
    """
    num_rows, num_reqs = draft_token_ids.shape[0], num_emitted.shape[0]
    integers = (torch.int32, torch.int64)
    check_shape("totals", totals, (SIZE,))
    check_dtype("totals", totals, torch.float64)
    check_dtype("draft_token_ids", draft_token_ids, *integers)
    check_shape("cu_num_rows", cu_num_rows, (num_reqs + 1,))
    check_shape("idx_mapping", idx_mapping, (num_reqs,))
    if survival.ndim != 2 or (survival.shape[1] > 1 and survival.stride(1) != 1):
        raise ValueError(f"survival has shape {tuple(survival.shape)}, expected (rows, K), rows contiguous")
    check_dtype("survival", survival, torch.float32)
    check_shape("relaxed", relaxed, (num_rows,))
    check_dtype("relaxed", relaxed, torch.bool)
    check_shape("regret", regret, (num_rows,))
    check_dtype("regret", regret, torch.float32)
    for name, events in (("exhausted", exhausted), ("guarded", guarded)):
        check_shape(name, events, (num_reqs,) if events.shape[0] else (0,))
        check_dtype(name, events, torch.bool)
    if first_draft not in (0, 1):
        raise ValueError(f"first_draft is {first_draft}, must be 0 or 1")
    _implementation(totals.device.type).count_drafts(
        totals,
        draft_token_ids,
        cu_num_rows,
        first_draft,
        num_emitted,
        idx_mapping,
        survival,
        relaxed,
        regret,
        exhausted,
        guarded,
    )


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.count import triton

        return triton
    from vllm_aasd.kernels.count import cpu

    return cpu
