"""Recovered tokens: what a sampled request emits in the place of its first rejected draft token.

Each is drawn from p without the draft token, renormalized, in one of two ways:

- with noise, as vLLM draws it: argmax_v p(v) / E(v) with independent exponential E(v) is v with probability p(v);
- by a uniform number u: the first token at which the running sum of p exceeds u times its total. A vocabulary of
  exponential numbers takes a CPU twenty times as long to draw as the row takes to read (1.0 ms against 0.05 at 49152
  tokens), and only requests with a seed need them, to get vLLM's tokens.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.checks import check_logits, check_tensor


def sample_recovered_tokens(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, inv_q: torch.Tensor
) -> torch.Tensor:
    """Draw the recovered token of each given row, with exponential noise.

    A token with p = 0 is never drawn from a row that has a softmax: if the draft alone has a probability, which
    rounding can leave rejected, the draft is emitted (vLLM emits token 0 there). A row without a softmax (NaN, +inf, or
    nothing but -inf) gives its argmax.

    Args:
        target_logits: as for `vllm_aasd.kernels.verify.verify`.
        rows: [n] int64, the rejected rows of sampled requests.
        draft_token_ids: [n] int32, the draft token rejected at each of these rows; -1 excludes nothing.
        inv_q: [n, vocab_size] float32, 1 / E with E drawn from the exponential distribution of rate 1.

    Returns:
        [n] int32 token ids.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or a row does not exist.
    """
    _check(target_logits, rows, draft_token_ids)
    check_tensor("inv_q", inv_q, (rows.shape[0], target_logits.shape[1]), torch.float32)
    implementation = _implementation(target_logits.device.type)
    return implementation.sample_recovered_tokens(target_logits, rows, draft_token_ids, inv_q)


def sample_recovered_tokens_by_uniform(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """As `sample_recovered_tokens`, by ``uniform``: [n] float64 in [0, 1)."""
    _check(target_logits, rows, draft_token_ids)
    check_tensor("uniform", uniform, rows.shape, torch.float64)
    implementation = _implementation(target_logits.device.type)
    return implementation.sample_recovered_tokens_by_uniform(target_logits, rows, draft_token_ids, uniform)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile both ways for logits of a dtype, or load them from the cache on disk.

    Args:
        device: where the logits will be.
        dtype: float32, bfloat16 or float16.
    """
    logits, row = torch.zeros(1, 2, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    sample_recovered_tokens(logits, row, row.int(), torch.ones(1, 2, device=device))
    sample_recovered_tokens_by_uniform(logits, row, row.int(), row.double())


def _check(target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor) -> None:
    num_drawn = rows.shape[0]
    check_logits("target_logits", target_logits)
    check_tensor("rows", rows, (num_drawn,), torch.int64)
    check_tensor("draft_token_ids", draft_token_ids, (num_drawn,), torch.int32)
    num_rows = target_logits.shape[0]
    for i, row in enumerate(rows.tolist()):
        if not 0 <= row < num_rows:
            raise ValueError(f"rows[{i}] is {row}, target_logits has {num_rows} rows")


def _implementation(device_type: str) -> ModuleType:
    if device_type == "cpu":
        from vllm_aasd.kernels.verify import recovered_cpu

        return recovered_cpu
    from vllm_aasd.kernels.verify import recovered_reference

    return recovered_reference
