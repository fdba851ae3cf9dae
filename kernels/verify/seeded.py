"""Verify, for vLLM's V2 runner: which drafts are accepted, and the tokens emitted after them, on the device.

The rule is that of `vllm_aasd.kernels.verify`. The arguments differ, because the V2 runner hands over draft and bonus
rows together, parameters by request slot, and seeds; all that follows from them happens in launches that don't depend
on data.

With u the uniform of (seed, position) and g(v) the Gumbel variable of (seed, position, v), as in
`vllm_aasd.kernels.verify.random_triton`, a sampled request accepts draft x iff log p(x) > log u, and draws from a row
the token argmax_v z(v) + g(v), without the draft rejected there. u and g are independent, so the emitted distribution
is p. Bonus rows are drawn from alike; greedy ones give their argmax. A budget's test of sampled requests uses the same
u. Strict results are those of vLLM's `rejection_sample` for one-hot drafts, except where log p(x) and log u are equal
to the last bits. Of a row without a softmax (NaN, +inf, or nothing but -inf) a sampled request rejects the draft and
emits the first NaN, else the first +inf, the draft left out.

Arguments, random numbers and output follow vLLM 0.32, `v1/worker/gpu/spec_decode/rejection_sampler_utils.py`.
Deviations: columns past the emitted tokens are -1, not undefined; NaN means what it means to `torch.argmax`; a
request of no rows emits nothing.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_logits, check_tensor
from vllm_aasd.kernels.verify.policies import VerifyPolicies, policy_shapes
from vllm_aasd.kernels.verify.reference import PLACEHOLDER_TOKEN_ID

__all__ = [
    "PLACEHOLDER_TOKEN_ID",
    "SeededBatch",
    "SeededVerifyOutput",
    "VerifyPolicies",
    "verify_seeded",
]


class SeededBatch(NamedTuple):
    """The arguments of `verify_seeded`. Tensors other than `target_logits` must be contiguous.

    Attributes:
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
    """

    target_logits: torch.Tensor
    draft_sampled: torch.Tensor
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
    all_greedy: bool = False


class SeededVerifyOutput(NamedTuple):
    """What one verification step emitted, as vLLM's V2 `rejection_sample` gives it, and why."""

    sampled: torch.Tensor
    """[num_reqs, num_speculative_steps + 1] int64: accepted tokens, the recovered or bonus token, then -1."""
    num_sampled: torch.Tensor
    """[num_reqs] int32: emitted tokens, the recovered or bonus token included; 0 for a request of no rows."""
    relaxed: torch.Tensor
    """[num_logits] bool: the draft tested by this row was accepted though the strict rule rejects it."""
    regret: torch.Tensor
    """[num_logits] float32, nats: log max p - log p(x) where `relaxed`, else 0."""
    exhausted: torch.Tensor
    """[num_reqs] bool: the request's budget ran out in this step; happens once."""
    guarded: torch.Tensor
    """[num_reqs] bool: the collapse guard engaged in this step."""


def verify_seeded(batch: SeededBatch) -> SeededVerifyOutput:
    """Verify a batch and emit its tokens, without a word to the host; the module's docstring has the rule.

    Returns:
        New tensors; nothing of the batch is modified but `policies.state`.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or is not contiguous. Values on the device are
            not checked.
    """
    num_logits = batch.target_logits.shape[0]
    num_reqs = batch.cu_num_logits.shape[0] - 1
    max_num_reqs = batch.temperature.shape[0]
    integers = (torch.int32, torch.int64)
    check_logits("target_logits", batch.target_logits)
    if batch.num_speculative_steps < 0:
        raise ValueError(f"num_speculative_steps is {batch.num_speculative_steps}, expected at least 0")
    if num_reqs < 0:
        raise ValueError("cu_num_logits has shape (0,), expected (num_reqs + 1,)")
    wanted = {
        "draft_sampled": (batch.draft_sampled, (num_logits,), integers),
        "cu_num_logits": (batch.cu_num_logits, (num_reqs + 1,), integers),
        "pos": (batch.pos, (num_logits,), (torch.int64,)),
        "idx_mapping": (batch.idx_mapping, (num_reqs,), integers),
        "expanded_idx_mapping": (batch.expanded_idx_mapping, (num_logits,), integers),
        "expanded_local_pos": (batch.expanded_local_pos, (num_logits,), integers),
        "temperature": (batch.temperature, (max_num_reqs,), (torch.float32,)),
        "seed": (batch.seed, (max_num_reqs,), (torch.int64,)),
        "stop_token_ids": (batch.stop_token_ids, (max_num_reqs, batch.stop_token_ids.shape[-1]), (torch.int32,)),
        **{
            name: (tensor, shape, (dtype,))
            for name, (tensor, shape, dtype) in policy_shapes(batch.policies, max_num_reqs).items()
        },
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        check_tensor(name, tensor, shape, *dtypes)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    return _implementation(batch.target_logits.device.type).verify_seeded(batch)


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.verify import triton

        return triton
    from vllm_aasd.kernels.verify import seeded_reference

    return seeded_reference
