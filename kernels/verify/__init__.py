"""Verify: which draft tokens of each request are accepted, and what is emitted after them.

The rule
    For one row let z be the processed target logits, p = softmax(z) and H = -sum p log p its entropy in nats.
    A draft token x, proposed with certainty, is accepted

    - in a greedy request iff x is the argmax of z, the lowest index among equals;
    - in a sampled request iff p(x) > 0 and p(x) >= u for a uniform u;
    - in a *relaxed* request of either kind, also iff its rule says so:
        conditional:      p(x) >= min(beta - alpha H, max p)
        fly:              -sum p log p over the three likeliest tokens >= threshold, the next `window` drafts of the
                          request are all there, and each is accepted strictly at its row
        budget, greedy:   log max p - log p(x) <= cap, and fewer than `per_step` of the step's tokens were relaxed
        budget, sampled:  d(u || p(x)) <= kappa, d(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), kappa > 0
      and all guards let it pass:
        p(x) >= floor,
        p(x) > 0,
        x is no stop token, and p(x) > sum of p over the request's stop tokens,
        level * decay + 1 <= limit, and the request isn't in a cooldown (the collapse guard),
        under budget, the budget covers its cost.

    The first rejection ends the request's prefix. A greedy request then emits the argmax, a sampled one a recovered
    token (`vllm_aasd.kernels.verify.recovered`); a request without a rejection emits its bonus token. p(x) >= max p is
    read as "x is the argmax", so of tokens tied for the maximum only the lowest index passes by it, and alpha = 0 with
    beta > 1 is exactly greedy. A row without a softmax (NaN, +inf, or nothing but -inf) accepts nothing but the greedy
    argmax, which for NaN is the first NaN, as in `torch.argmax`.

A request's state
    Each emitted token, the last one included, makes level <- level * decay + 1 if it was relaxed, level * decay
    otherwise, and counts a cooldown down. A draft that only the level rejects starts a cooldown: the `cooldown` tokens
    after the one that is emitted instead are verified strictly. A budget pays for a greedy request's relaxed tokens,
    each its regret log max p - log p(x). For a sampled request it pays min(kappa, -log p(x)) at every row that is
    reached and where the guards on p(x) and the collapse guard leave the draft open, accepted or not: the KL divergence
    of the row's distribution from p. The first cost that it can't cover exhausts it, and the request is strict from
    there on. With `nats` = 0, and for sampled requests with kappa = 0, it is strict throughout.

docs/verification.md explains the rules and guards and names their sources. Output layout and placeholder are those of
vLLM's `v1/sample/rejection_sampler.py`.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.checks import check_dtype, check_logits, check_shape, check_tensor
from vllm_aasd.kernels.verify import reference
from vllm_aasd.kernels.verify.policies import CONDITIONAL, NUM_PARAMETERS, NUM_STATES, VerifyPolicies, policy_shapes
from vllm_aasd.kernels.verify.reference import PLACEHOLDER_TOKEN_ID, VerifyOutput

__all__ = ["PLACEHOLDER_TOKEN_ID", "VerifyOutput", "VerifyPolicies", "verify", "warm_up"]


def verify(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    max_spec_len: int,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    is_greedy: torch.Tensor,
    uniform_probs: torch.Tensor | None,
    policies: VerifyPolicies,
    stop_token_ids: torch.Tensor,
) -> VerifyOutput:
    """Decide which draft tokens are accepted; the module's docstring has the rule and its sources.

    Args:
        draft_token_ids: [num_tokens] int32. -1, or any id outside the vocabulary, is always rejected.
        cu_num_draft_tokens: [batch_size] int32, inclusive cumulative: request i owns the rows from
            entry i - 1 (0 for the first) up to entry i.
        max_spec_len: the most drafts that a request may have; width of the output less one.
        target_logits: [num_tokens, vocab_size] float32, bfloat16 or float16, any row stride. Already
            processed: penalties, masks (-inf), temperature, top-k and top-p; greedy rows at temperature 1.
            Not modified.
        bonus_token_ids: [batch_size] or [batch_size, 1], int32 or int64.
        is_greedy: [batch_size] bool.
        uniform_probs: [num_tokens] float64 in [0, 1); None if every request is greedy.
        policies: per-request verification and what is remembered of each request, see `VerifyPolicies`.
        stop_token_ids: [batch_size, max_stop] int32, the distinct ids that end the request, padded with -1.

    Returns:
        A `VerifyOutput` of new tensors. `policies.state` is updated in place, and nothing else.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or the cumulative counts are impossible.
    """
    num_tokens = draft_token_ids.shape[0]
    batch_size = cu_num_draft_tokens.shape[0]
    check_logits("target_logits", target_logits)
    check_shape("target_logits", target_logits, (num_tokens, target_logits.shape[1]))
    check_tensor("draft_token_ids", draft_token_ids, (num_tokens,), torch.int32)
    check_tensor("cu_num_draft_tokens", cu_num_draft_tokens, (batch_size,), torch.int32)
    if bonus_token_ids.shape != (batch_size, 1):
        check_shape("bonus_token_ids", bonus_token_ids, (batch_size,))
    check_dtype("bonus_token_ids", bonus_token_ids, torch.int64, torch.int32)
    check_tensor("is_greedy", is_greedy, (batch_size,), torch.bool)
    if uniform_probs is not None:
        check_tensor("uniform_probs", uniform_probs, (num_tokens,), torch.float64)
    elif not is_greedy.all():
        raise ValueError("uniform_probs is None, which is allowed only if every request is greedy")
    for name, (tensor, shape, dtype) in policy_shapes(policies, batch_size).items():
        check_tensor(name, tensor, shape, dtype)
    check_tensor("stop_token_ids", stop_token_ids, (batch_size, stop_token_ids.shape[-1]), torch.int32)
    return _implementation(target_logits.device.type).verify(
        draft_token_ids,
        cu_num_draft_tokens,
        max_spec_len,
        target_logits,
        bonus_token_ids,
        is_greedy,
        uniform_probs,
        policies,
        stop_token_ids,
    )


def _implementation(device_type: str) -> ModuleType:
    if device_type == "cpu":
        from vllm_aasd.kernels.verify import cpu

        return cpu
    return reference


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what `verify` needs for logits of a dtype, or load it from the cache on disk.

    To be called when a worker starts, so that no request waits for the compiler (seconds without a cache).

    Args:
        device: where the logits will be.
        dtype: float32, bfloat16 or float16.
    """
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=dtype, device=device)
    drafts = torch.tensor([0, 0], dtype=torch.int32, device=device)
    policies = VerifyPolicies(
        torch.full((2,), CONDITIONAL, dtype=torch.int32, device=device),
        torch.ones(2, NUM_PARAMETERS, device=device),
        drafts,
        torch.zeros(1, NUM_STATES, device=device),
    )
    verify(
        drafts,
        torch.tensor([1, 2], dtype=torch.int32, device=device),
        1,
        logits,
        drafts,
        torch.tensor([True, False], device=device),
        torch.full((2,), 0.9, dtype=torch.float64, device=device),
        policies,
        drafts[:, None],
    )
