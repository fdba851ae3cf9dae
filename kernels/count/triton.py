"""The Triton path of `count`. What is counted is in `vllm_aasd.kernels.count`."""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.count import reference as places

REQUESTS = 16
"""Of one program: with 8 draft tokens each, one of them for each of 128 threads."""


# What may change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_reqs", "num_columns"],
    do_not_specialize_on_alignment=["cu_num_rows_ptr", "idx_mapping_ptr", "exhausted_ptr", "guarded_ptr"],
)
def count_kernel(
    totals_ptr,  # [SIZE]
    draft_token_ids_ptr,  # [num_rows]
    cu_num_rows_ptr,  # [num_reqs + 1]
    num_emitted_ptr,  # [num_reqs]
    idx_mapping_ptr,  # [num_reqs]
    survival_ptr,  # [max_num_reqs, num_columns]
    survival_stride,
    relaxed_ptr,  # [num_rows]
    regret_ptr,  # [num_rows]
    exhausted_ptr,  # [num_reqs] or [0]
    guarded_ptr,  # [num_reqs] or [0]
    num_reqs,
    num_columns,
    FIRST_DRAFT: tl.constexpr,
    DRAFTS: tl.constexpr,
    DRAFT_TOKENS: tl.constexpr,
    ACCEPTED: tl.constexpr,
    RELAXED: tl.constexpr,
    REGRET: tl.constexpr,
    EXHAUSTED: tl.constexpr,
    GUARDED: tl.constexpr,
    LENGTHS: tl.constexpr,
    SURVIVAL_BINS: tl.constexpr,
    SURVIVAL_TOKENS: tl.constexpr,
    SURVIVAL_PROMISED: tl.constexpr,
    SURVIVAL_ACCEPTED: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
    HAS_GUARDS: tl.constexpr,
):
    """Add a few requests to the totals; see `vllm_aasd.kernels.count`."""
    reqs = tl.program_id(0) * REQUESTS + tl.arange(0, REQUESTS)
    present = reqs < num_reqs
    starts = tl.load(cu_num_rows_ptr + reqs, mask=present, other=0).to(tl.int64)
    ends = tl.load(cu_num_rows_ptr + reqs + 1, mask=present, other=0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)[None, :]
    tests = starts[:, None] + columns
    ids = tl.load(draft_token_ids_ptr + tests + FIRST_DRAFT, mask=tests + FIRST_DRAFT < ends[:, None], other=-1)
    is_draft = ids >= 0
    lengths = tl.sum(is_draft.to(tl.int32), axis=1)
    emitted = tl.load(num_emitted_ptr + reqs, mask=present, other=1).to(tl.int32)
    accepted = tl.where(lengths > 0, emitted - 1, 0)
    is_accepted = is_draft & (columns < accepted[:, None])
    relaxed = tl.load(relaxed_ptr + tests, mask=is_accepted, other=0).to(tl.int32)
    regret = tl.load(regret_ptr + tests, mask=is_accepted, other=0.0).to(tl.float64)

    tl.atomic_add(totals_ptr + DRAFTS, tl.sum((lengths > 0).to(tl.int32)).to(tl.float64))
    tl.atomic_add(totals_ptr + DRAFT_TOKENS, tl.sum(lengths).to(tl.float64))
    tl.atomic_add(totals_ptr + ACCEPTED, tl.sum(accepted).to(tl.float64))
    tl.atomic_add(totals_ptr + RELAXED, tl.sum(tl.sum(relaxed, axis=1)).to(tl.float64))
    tl.atomic_add(totals_ptr + REGRET, tl.sum(tl.sum(regret, axis=1)))
    if HAS_BUDGETS:
        exhausted = tl.load(exhausted_ptr + reqs, mask=present, other=0).to(tl.int32)
        tl.atomic_add(totals_ptr + EXHAUSTED, tl.sum(exhausted).to(tl.float64))
    if HAS_GUARDS:
        guarded = tl.load(guarded_ptr + reqs, mask=present, other=0).to(tl.int32)
        tl.atomic_add(totals_ptr + GUARDED, tl.sum(guarded).to(tl.float64))
    ones = tl.full([REQUESTS], 1.0, tl.float64)
    tl.atomic_add(totals_ptr + LENGTHS + lengths - 1, ones, mask=lengths > 0)

    slots = tl.load(idx_mapping_ptr + reqs, mask=present, other=0).to(tl.int64)
    promised = tl.load(
        survival_ptr + slots[:, None] * survival_stride + columns, mask=is_draft & (columns < num_columns), other=-1.0
    )
    is_promised = promised >= 0
    tenths = tl.minimum((promised * SURVIVAL_BINS).to(tl.int32), SURVIVAL_BINS - 1)
    all_ones = tl.full([REQUESTS, COLUMNS], 1.0, tl.float64)
    tl.atomic_add(totals_ptr + SURVIVAL_TOKENS + tenths, all_ones, mask=is_promised)
    tl.atomic_add(totals_ptr + SURVIVAL_PROMISED + tenths, promised.to(tl.float64), mask=is_promised)
    tl.atomic_add(totals_ptr + SURVIVAL_ACCEPTED + tenths, all_ones, mask=is_promised & is_accepted)


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
    """See `vllm_aasd.kernels.count.count_drafts`."""
    num_reqs, num_columns = len(num_emitted), survival.shape[1]
    if num_reqs == 0:
        return
    count_kernel[(triton.cdiv(num_reqs, REQUESTS),)](
        totals,
        draft_token_ids,
        cu_num_rows,
        num_emitted,
        idx_mapping,
        survival,
        survival.stride(0),
        relaxed,
        regret,
        exhausted,
        guarded,
        num_reqs,
        num_columns,
        FIRST_DRAFT=first_draft,
        DRAFTS=places.DRAFTS,
        DRAFT_TOKENS=places.DRAFT_TOKENS,
        ACCEPTED=places.ACCEPTED,
        RELAXED=places.RELAXED,
        REGRET=places.REGRET,
        EXHAUSTED=places.EXHAUSTED,
        GUARDED=places.GUARDED,
        LENGTHS=places.LENGTHS,
        SURVIVAL_BINS=places.SURVIVAL_BINS,
        SURVIVAL_TOKENS=places.SURVIVAL_TOKENS,
        SURVIVAL_PROMISED=places.SURVIVAL_PROMISED,
        SURVIVAL_ACCEPTED=places.SURVIVAL_ACCEPTED,
        REQUESTS=REQUESTS,
        COLUMNS=triton.next_power_of_2(num_columns),
        HAS_BUDGETS=len(exhausted) > 0,
        HAS_GUARDS=len(guarded) > 0,
        num_warps=4,
    )
