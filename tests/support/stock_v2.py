"""vLLM's own V2 kernels under the interpreter, which its CPU build keeps from running; imported there only."""

import types
from typing import Any

import numpy as np
import torch
import triton
import triton.backends
import triton.language as tl
from triton.runtime import interpreter


def _enable() -> None:
    """Make vLLM count Triton as present, and the interpreter take integer masks as the compiler does."""
    triton.backends.backends["cpu"] = types.SimpleNamespace(
        driver=types.SimpleNamespace(is_active=lambda: False), compiler=None
    )
    builder = interpreter.InterpreterBuilder
    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(builder, name)
        position = {"create_masked_load": 1, "create_masked_store": 2}[name]

        def with_bool_mask(self: Any, *args: Any, original: Any = original, position: int = position) -> Any:
            mask = args[position]
            if mask is not None and mask.data.dtype != np.bool_:
                mask = interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)
            return original(self, *args[:position], mask, *args[position + 1 :])

        setattr(builder, name, with_bool_mask)


_enable()

from vllm.v1.worker.gpu.sample import gumbel  # noqa: E402
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample  # noqa: E402

from vllm_aasd.kernels import noise_triton  # noqa: E402

__all__ = ["numbers", "rejection_sample"]


@triton.jit
def _numbers_kernel(out_ptr, seed_ptr, pos_ptr, ids_ptr, N: tl.constexpr, OURS: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    pos = tl.load(pos_ptr)
    ids = tl.load(ids_ptr + i)
    if OURS:
        tl.store(out_ptr + i, noise_triton.row_uniform(seed, pos + i.to(tl.int64)))
        tl.store(out_ptr + N + i, noise_triton.token_gumbel(seed, pos, ids))
    else:
        tl.store(out_ptr + i, gumbel.tl_rand32(seed, pos + i.to(tl.int64), includes_zero=False))
        u = gumbel.murmur3_uniform32(seed, pos, ids)
        tl.store(out_ptr + N + i, -tl.log(-gumbel._log1p_neg_stable(u)))


def numbers(seed: int, position: int, ids: torch.Tensor, ours: bool) -> torch.Tensor:
    """Uniforms of the positions from `position` on, and Gumbel variables of token ids at it, [2, len(ids)]."""
    out = torch.empty(2, len(ids))
    _numbers_kernel[(1,)](
        out, torch.tensor([seed]), torch.tensor([position]), ids.int(), N=len(ids), OURS=ours
    )
    return out
