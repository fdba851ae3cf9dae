"""Triton path of `count`; see `vllm_aasd.kernels.count`."""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels import count
from vllm_aasd.kernels.verify import VerifyOutput

REQUESTS = 16
"""Requests of one program: with 8 draft tokens each, one for each of 128 threads."""

_RELAXED, _REGRET = tl.constexpr(count.RELAXED), tl.constexpr(count.REGRET)
_EXHAUSTED, _GUARDED = tl.constexpr(count.EXHAUSTED), tl.constexpr(count.GUARDED)
_SURVIVAL_BINS, _SURVIVAL_TOKENS = tl.constexpr(count.SURVIVAL_BINS), tl.constexpr(count.SURVIVAL_TOKENS)
_SURVIVAL_PROMISED = tl.constexpr(count.SURVIVAL_PROMISED)
_SURVIVAL_ACCEPTED = tl.constexpr(count.SURVIVAL_ACCEPTED)


# What may change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_reqs", "num_columns"],
    do_not_specialize_on_alignment=["cu_num_rows_ptr", "idx_mapping_ptr", "exhausted_ptr", "guarded_ptr"],
)
def count_kernel(
    totals_ptr,  # [SIZE]
    draft_token_ids_ptr,  # [num_rows]
    cu_num_rows_ptr,  # [num_reqs + 1]
    idx_mapping_ptr,  # [num_reqs]
    survival_ptr,  # [max_num_reqs, num_columns]
    survival_stride,
    num_emitted_ptr,  # [num_reqs]
    relaxed_ptr,  # [num_rows]
    regret_ptr,  # [num_rows]
    exhausted_ptr,  # [num_reqs]
    guarded_ptr,  # [num_reqs]
    num_reqs,
    num_columns,
    FIRST_DRAFT: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a few requests to the totals; see `vllm_aasd.kernels.count`."""
    reqs = tl.program_id(0) * REQUESTS + tl.arange(0, REQUESTS)
    present = reqs < num_reqs
    starts = tl.load(cu_num_rows_ptr + reqs, mask=present, other=0).to(tl.int64)
    ends = tl.load(cu_num_rows_ptr + reqs + 1, mask=present, other=0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)[None, :]
    tests = starts[:, None] + columns
    is_row = (tests + FIRST_DRAFT < ends[:, None]) & (columns < num_columns)
    ids = tl.load(draft_token_ids_ptr + tests + FIRST_DRAFT, mask=is_row, other=-1)
    is_draft = ids >= 0
    accepted = tl.load(num_emitted_ptr + reqs, mask=present, other=1) - 1
    is_accepted = is_draft & (columns < accepted[:, None])
    relaxed = tl.load(relaxed_ptr + tests, mask=is_accepted, other=0).to(tl.int32)
    regret = tl.load(regret_ptr + tests, mask=is_accepted, other=0.0).to(tl.float64)
    exhausted = tl.load(exhausted_ptr + reqs, mask=present, other=0).to(tl.int32)
    guarded = tl.load(guarded_ptr + reqs, mask=present, other=0).to(tl.int32)
    tl.atomic_add(totals_ptr + _RELAXED, tl.sum(tl.sum(relaxed, axis=1)).to(tl.float64))
    tl.atomic_add(totals_ptr + _REGRET, tl.sum(tl.sum(regret, axis=1)))
    tl.atomic_add(totals_ptr + _EXHAUSTED, tl.sum(exhausted).to(tl.float64))
    tl.atomic_add(totals_ptr + _GUARDED, tl.sum(guarded).to(tl.float64))

    slots = tl.load(idx_mapping_ptr + reqs, mask=present, other=0).to(tl.int64)
    promised = tl.load(survival_ptr + slots[:, None] * survival_stride + columns, mask=is_draft, other=-1.0)
    is_promised = promised >= 0
    tenths = tl.minimum((promised * _SURVIVAL_BINS).to(tl.int32), _SURVIVAL_BINS - 1)
    ones = tl.full([REQUESTS, COLUMNS], 1.0, tl.float64)
    tl.atomic_add(totals_ptr + _SURVIVAL_TOKENS + tenths, ones, mask=is_promised)
    tl.atomic_add(totals_ptr + _SURVIVAL_PROMISED + tenths, promised.to(tl.float64), mask=is_promised)
    tl.atomic_add(totals_ptr + _SURVIVAL_ACCEPTED + tenths, ones, mask=is_promised & is_accepted)


def count_drafts(
    totals: torch.Tensor,
    draft_token_ids: torch.Tensor,
    cu_num_rows: torch.Tensor,
    first_draft: int,
    idx_mapping: torch.Tensor,
    survival: torch.Tensor,
    output: VerifyOutput,
) -> None:
    """See `vllm_aasd.kernels.count.count_drafts`."""
    num_reqs, num_columns = len(idx_mapping), survival.shape[1]
    if num_reqs == 0:
        return
    count_kernel[(triton.cdiv(num_reqs, REQUESTS),)](
        totals,
        draft_token_ids,
        cu_num_rows,
        idx_mapping,
        survival,
        survival.stride(0),
        *output[1:],
        num_reqs,
        num_columns,
        FIRST_DRAFT=first_draft,
        REQUESTS=REQUESTS,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=4,
    )
