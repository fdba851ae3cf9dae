"""Verify, for vLLM's V2 runner: which drafts are accepted, and the tokens emitted after them, on the device.

Why a module beside `verify`
    The rule is one, and its words stand in `vllm_aasd.kernels.verify`; in code, `verify_reference` holds it
    once, for both twins. What differs is who does the rest. The V1 runner hands over draft rows with bonus
    tokens already sampled, uniforms drawn from a `torch.Generator` on the host, and parameters per batch
    row; it draws recovered tokens itself, for rows that it picks out on the host. The V2 runner hands over
    draft and bonus rows together, parameters per request slot and seeds; all that follows from them has to
    happen in launches that know nothing of the data. One signature would be two sets of arguments of which
    half is always None.

The rule, with vLLM's random numbers
    With u the uniform of (seed, position) and g(v) the Gumbel variable of (seed, position, v), as in
    `vllm_aasd.kernels.verify.random_triton`, a sampled request accepts draft x iff log p(x) > log u, and draws from a
    row the token argmax_v z(v) + g(v), the draft rejected there left out. u and g are independent, so the
    emitted law is that of `verify`: p. Bonus rows are drawn from alike, greedy ones give their argmax.
    Strict results are those of vLLM's `rejection_sample` for one-hot drafts, in float32 noise; where
    log p(x) and log u are equal to the last bits the order of summation may decide otherwise. A budget's test of
    sampled requests uses the same u.
    Of a row without a softmax (NaN, +inf, or nothing but -inf) a sampled request rejects the draft, and its
    race is won by the first NaN, else the first +inf, the draft left out. A token with p = 0 can win only
    there: g lies between -3 and 23, so the winner's logit is at most 26 below the maximum, and a draft that
    alone has a probability has log p(x) = 0 exactly and is accepted.

Memory
    With V the vocabulary, a request of d drafts owns d + 1 rows of logits. A block of logits is loaded once,
    16 bytes a thread and instruction, and reduced in registers to its maximum m, argmax, s = sum e^(z - m)
    and t = sum e^(z - m) (z - m), 16 bytes for 4 to 16 KiB of logits (24 for fly, with the second and
    the third logit). Blocks i merge by
        m = max m_i,  s = sum s_i e^(m_i - m),  t = sum e^(m_i - m) (t_i + (m_i - m) s_i),  H = log s - t / s
    (the online softmax of Milakov and Gimelshein, arXiv 1805.02867, extended by the entropy). p of the draft
    and of the stop tokens needs single logits, a sector of 32 bytes each.

    Greedy requests read d + 1 rows, the least there is. Sampled ones read d rows for the decision, and one
    row for the race: the bonus row, which the decision doesn't need, or the rejected one, a second time; so
    d + 1 in either case. Rows behind a placeholder draft (-1) are not read, nor are placeholder rows of
    sampled requests. Counted (`benchmarks/kernels.py`, narrow blocks), all that moves is 1.01 times one read of
    all rows.

    vLLM's kernels read as much for sampled requests. For greedy ones they read the bonus row only if every
    draft was accepted, in two further launches; ours reads it always and, all being greedy, launches no more.
    They give neither entropy nor stop mass, for each of which another pass would be due.
    Few rows are cut into narrower blocks (`rows_triton.launch_shape`), so that one request fills a GPU.

Sources
    Those of `vllm_aasd.kernels.verify`. Arguments, random numbers and output follow vLLM 0.32,
    `v1/worker/gpu/spec_decode/rejection_sampler_utils.py`. Deviations: columns past the emitted tokens are
    -1, not undefined; NaN means what it means to `torch.argmax`; a request of no rows emits nothing.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_logits, check_shape
from vllm_aasd.kernels.verify import seeded_reference
from vllm_aasd.kernels.verify.policies import VerifyPolicies, policy_shapes
from vllm_aasd.kernels.verify.reference import PLACEHOLDER_TOKEN_ID
from vllm_aasd.kernels.verify.seeded_reference import SeededVerifyOutput

__all__ = [
    "PLACEHOLDER_TOKEN_ID",
    "SeededVerifyOutput",
    "VerifyPolicies",
    "verify_seeded",
]


def verify_seeded(
    target_logits: torch.Tensor,
    draft_sampled: torch.Tensor,
    cu_num_logits: torch.Tensor,
    pos: torch.Tensor,
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    num_speculative_steps: int,
    policies: VerifyPolicies,
    stop_token_ids: torch.Tensor,
    all_greedy: bool = False,
) -> SeededVerifyOutput:
    """Verify a batch and emit its tokens, without a word to the host; the module's docstring has the rule.

    Nothing is modified but `policies.state`. Tensors other than `target_logits` must be
    contiguous.

    Args:
        target_logits: [num_logits, vocab_size] float32, bfloat16 or float16, any row stride: draft rows and
            the bonus row of each request. Already processed: penalties, masks (-inf), temperature, top-k and
            top-p; greedy rows at temperature 1.
        draft_sampled: [num_logits] int32 or int64, the input token of each row: the draft that row i tests
            is that of row i + 1. -1, or any id outside the vocabulary, is always rejected.
        cu_num_logits: [num_reqs + 1] int32 or int64: request i owns the rows from entry i up to entry i + 1,
            at most num_speculative_steps + 1. Rows after the last entry have no request; their `relaxed`
            and `regret` are undefined.
        pos: [num_logits] int64, the position of each row, which names its random numbers.
        idx_mapping: [num_reqs] int32 or int64, the slot of each request: the index of what is
            [max_num_reqs].
        expanded_idx_mapping: [num_logits] int32 or int64, the slot of each row's request; -1 is padding.
        expanded_local_pos: [num_logits] int32 or int64, each row's place among those of its request.
        temperature: [max_num_reqs] float32; 0 is greedy. Otherwise not applied here.
        seed: [max_num_reqs] int64.
        num_speculative_steps: the most drafts of a request; the width of the output less one.
        policies: by slot, see `VerifyPolicies`; no two requests of a batch may share a row of the state.
        stop_token_ids: [max_num_reqs, max_stop] int32, the distinct ids that end a request, padded with -1.
        all_greedy: True only if the temperature of every request is known to be 0: two launches less.

    Returns:
        A `SeededVerifyOutput` of new tensors.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or is not contiguous. Values on the device are
            not checked.
    """
    num_logits = target_logits.shape[0]
    num_reqs = cu_num_logits.shape[0] - 1
    max_num_reqs = temperature.shape[0]
    integers = (torch.int32, torch.int64)
    check_logits("target_logits", target_logits)
    if num_speculative_steps < 0:
        raise ValueError(f"num_speculative_steps is {num_speculative_steps}, expected at least 0")
    if num_reqs < 0:
        raise ValueError("cu_num_logits has shape (0,), expected (num_reqs + 1,)")
    wanted = {
        "draft_sampled": (draft_sampled, (num_logits,), integers),
        "cu_num_logits": (cu_num_logits, (num_reqs + 1,), integers),
        "pos": (pos, (num_logits,), (torch.int64,)),
        "idx_mapping": (idx_mapping, (num_reqs,), integers),
        "expanded_idx_mapping": (expanded_idx_mapping, (num_logits,), integers),
        "expanded_local_pos": (expanded_local_pos, (num_logits,), integers),
        "temperature": (temperature, (max_num_reqs,), (torch.float32,)),
        "seed": (seed, (max_num_reqs,), (torch.int64,)),
        "stop_token_ids": (stop_token_ids, (max_num_reqs, stop_token_ids.shape[-1]), (torch.int32,)),
        **{
            name: (tensor, shape, (dtype,))
            for name, (tensor, shape, dtype) in policy_shapes(policies, max_num_reqs).items()
        },
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, *dtypes)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    return _implementation(target_logits.device.type).verify_seeded(
        target_logits,
        draft_sampled,
        cu_num_logits,
        pos,
        idx_mapping,
        expanded_idx_mapping,
        expanded_local_pos,
        temperature,
        seed,
        num_speculative_steps,
        policies,
        stop_token_ids,
        all_greedy,
    )


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.verify import triton

        return triton
    return seeded_reference
