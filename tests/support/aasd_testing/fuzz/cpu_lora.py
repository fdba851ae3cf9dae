"""Mends what vLLM 0.32's CPU build does to requests without an adapter that run beside one with: it adapts them, too.

A token without an adapter has the index -1, which Triton's kernels skip; those in PyTorch, the CPU's, take the last
adapter for it. vLLM's own pull request, not merged yet: https://github.com/vllm-project/vllm/pull/48421
"""

from typing import Any

import torch


def mend() -> None:
    """Have a token without an adapter get nothing of one, in this process from here on."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    # Of a row of zeros the second half of an adapter makes zeros, so it is left as it is.
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = without_adapter_nothing(lora_ops.bgmv_shrink)


def without_adapter_nothing(stock: Any) -> Any:
    """vLLM's ``bgmv_shrink``, whose rows of index -1 are zeros."""

    def bgmv_shrink(
        inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
    ) -> None:
        stock(inputs, weights, output, indices, scaling)
        output[indices == -1] = 0

    return bgmv_shrink
