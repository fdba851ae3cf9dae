"""Redraw: the recovered tokens of rejected rows, by one uniform number each.

What is drawn is what `vllm_aasd.kernels.verify.recover` draws, p without the draft token renormalised, by
inversion of its distribution function: the first token at which the running sum of the weights exceeds
u times their total. `recover` needs an exponential number for every token of the vocabulary, which on a CPU
takes twenty times as long to draw as the row takes to read (1.0 ms against 0.05 at 49152 tokens); a request
with a seed pays for them, because vLLM draws them from its generator, and no other has to.
"""

import torch

from vllm_aasd.kernels.common.checks import check_dtype, check_rejected_rows, check_shape
from vllm_aasd.kernels.verify import recovered_reference


def redraw(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Draw the recovered token of each given row from p without its draft token.

    A token with p = 0 is never drawn from a row that has a softmax: if the draft alone has a probability, it is
    emitted. A row without a softmax (NaN, +inf, or nothing but -inf) gives its argmax.

    Args:
        target_logits, rows, draft_token_ids: as for `vllm_aasd.kernels.verify.recover`.
        uniform: [n] float64 in [0, 1).

    Returns:
        [n] int32 token ids.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or a row does not exist.
    """
    check_rejected_rows(target_logits, rows, draft_token_ids)
    check_shape("uniform", uniform, rows.shape)
    check_dtype("uniform", uniform, torch.float64)
    if target_logits.device.type == "cpu":
        from vllm_aasd.kernels.verify import recovered_cpu

        return recovered_cpu.redraw(target_logits, rows, draft_token_ids, uniform)
    return recovered_reference.redraw(target_logits, rows, draft_token_ids, uniform)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what `redraw` needs for logits of a dtype, or load it from the cache on disk.

    Args:
        device: where the logits will be.
        dtype: float32, bfloat16 or float16.
    """
    row = torch.zeros(1, dtype=torch.int64, device=device)
    redraw(torch.zeros(1, 2, dtype=dtype, device=device), row, row.int(), row.double())
