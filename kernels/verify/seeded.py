"""Verify on the device, for vLLM's V2 runner: accepted draft tokens, and the recovered or bonus token after them.

The rule is that of `vllm_aasd.kernels.verify`. The arguments differ, because the V2 runner has draft and bonus rows
together, parameters by request index, and seeds. No launch depends on data.

With u the uniform of (seed, position) and g(v) the Gumbel variable of (seed, position, v), as in
`vllm_aasd.kernels.verify.random_triton`, a sampled request accepts draft token x iff log p(x) > log u, and its
recovered token is argmax_v z(v) + g(v) over all tokens but the rejected one. u and g are independent, so the emitted
distribution is p. Bonus tokens are drawn in the same way; greedy ones are the argmax. The budget of sampled requests
uses the same u. Strict results are those of vLLM's `rejection_sample` for one-hot drafts, except where log p(x) and
log u are equal to the last bits. At a row without a softmax (NaN, +inf, or nothing but -inf) a sampled request rejects
the draft token and emits the first NaN, else the first +inf, without the draft token.

Arguments, random numbers and output follow vLLM 0.32, `v1/worker/gpu/spec_decode/rejection_sampler_utils.py`.
Deviations: columns after the emitted tokens are -1, not undefined; NaN is treated as in `torch.argmax`; a request
without rows emits nothing.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from vllm_aasd.kernels import count
from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import INTEGERS, check_logits, check_once, check_tensors
from vllm_aasd.kernels.verify import VerifyOutput
from vllm_aasd.kernels.verify.policies import VerifyPolicies, policy_tensors


class SeededBatch(NamedTuple):
    """The arguments of `verify_seeded`. Tensors other than `target_logits` must be contiguous.

    Attributes:
        target_logits: [num_logits, vocab_size] float32, bfloat16 or float16, any row stride: draft rows and
            the bonus row of each request. Already processed: penalties, masks (-inf), temperature, top-k and
            top-p; greedy rows at temperature 1.
        draft_sampled: [num_logits] int32 or int64, the input token of each row: row i tests the draft token
            of row i + 1. -1, or any id outside the vocabulary, is always rejected.
        num_drafts: [max_num_reqs] int32, how many of a request's draft tokens were drafted. Those after them are
            fillers, always rejected.
        cu_num_logits: [num_reqs + 1] int32 or int64: request i owns the rows from entry i up to entry i + 1,
            at most num_speculative_steps + 1. Rows after the last entry have no request; their `relaxed`
            and `regret` are undefined.
        pos: [num_logits] int64, the position of each row, from which its random numbers follow.
        idx_mapping: [num_reqs] int32 or int64, the request index of each request, into what is [max_num_reqs].
        expanded_idx_mapping: [num_logits] int32 or int64, the request index of each row; -1 is padding.
        expanded_local_pos: [num_logits] int32 or int64, each row's position among those of its request.
        temperature: [max_num_reqs] float32; 0 is greedy. Otherwise not applied here.
        seed: [max_num_reqs] int64.
        num_speculative_steps: the most draft tokens of a request; the width of the output less one.
        policies: by request index, see `VerifyPolicies`; no two requests of a batch may share a row of the state.
        stop_token_ids: [max_num_reqs, max_stop] int32, the distinct ids that end a request, padded with -1.
        survival: [max_num_reqs, K] float32, the probabilities promised when the drafts were made, see
            `vllm_aasd.kernels.count`.
        totals: [count.SIZE] float64, added to: what became of the drafts, see there.
        all_greedy: True only if the temperature of every request is known to be 0: saves two launches.
    """

    target_logits: torch.Tensor
    draft_sampled: torch.Tensor
    num_drafts: torch.Tensor
    cu_num_logits: torch.Tensor
    pos: torch.Tensor
    idx_mapping: torch.Tensor
    expanded_idx_mapping: torch.Tensor
    expanded_local_pos: torch.Tensor
    temperature: torch.Tensor
    seed: torch.Tensor
    num_speculative_steps: int
    policies: VerifyPolicies
    stop_token_ids: torch.Tensor
    survival: torch.Tensor
    totals: torch.Tensor
    all_greedy: bool = False


def verify_seeded(batch: SeededBatch) -> VerifyOutput:
    """Verify a batch without waiting for the device; the module's docstring has the rule.

    Returns:
        New tensors, by request and row of the batch; `sampled` is int64. `policies.state` and `totals` are updated in
        place; nothing else of the batch is modified.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or is not contiguous. Values on the device are
            not checked.
    """
    check_once(_check, batch)
    return _implementation(batch.target_logits.device.type).verify_seeded(batch)


def _check(batch: SeededBatch) -> None:
    num_logits = batch.target_logits.shape[0]
    num_reqs = batch.cu_num_logits.shape[0] - 1
    max_num_reqs = batch.temperature.shape[0]
    check_logits("target_logits", batch.target_logits, num_logits)
    if batch.num_speculative_steps < 0:
        raise ValueError(f"num_speculative_steps is {batch.num_speculative_steps}, expected at least 0")
    if num_reqs < 0:
        raise ValueError("cu_num_logits has shape (0,), expected (num_reqs + 1,)")
    check_tensors(
        ("draft_sampled", batch.draft_sampled, (num_logits,), *INTEGERS),
        ("num_drafts", batch.num_drafts, (max_num_reqs,), torch.int32),
        ("cu_num_logits", batch.cu_num_logits, (num_reqs + 1,), *INTEGERS),
        ("pos", batch.pos, (num_logits,), torch.int64),
        ("idx_mapping", batch.idx_mapping, (num_reqs,), *INTEGERS),
        ("expanded_idx_mapping", batch.expanded_idx_mapping, (num_logits,), *INTEGERS),
        ("expanded_local_pos", batch.expanded_local_pos, (num_logits,), *INTEGERS),
        ("temperature", batch.temperature, (max_num_reqs,), torch.float32),
        ("seed", batch.seed, (max_num_reqs,), torch.int64),
        ("stop_token_ids", batch.stop_token_ids, (max_num_reqs, batch.stop_token_ids.shape[-1]), torch.int32),
        *policy_tensors(batch.policies, max_num_reqs),
        ("survival", batch.survival, (max_num_reqs, batch.survival.shape[-1]), torch.float32),
        ("totals", batch.totals, (count.SIZE,), torch.float64),
        contiguous=True,
    )


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.verify import triton

        return triton
    from vllm_aasd.kernels.verify import reference

    return reference
