"""What the interpreting process runs beside our ops: vLLM's own V2 kernels, and the count of bytes."""

import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

# Behind what is installed, and only for these imports: the root also holds `kernels`, a name that
# transformers looks for.
_ROOT = str(Path(__file__).parents[3])
sys.path.append(_ROOT)
from benchmarks import kernels

sys.path.remove(_ROOT)

from aasd_testing import interpreted

interpreted.let_vllm_see_triton()

from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm_aasd.kernels.verify import random_triton as noise_triton

__all__ = ["count_bytes", "numbers", "rejection_sample"]


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
    _numbers_kernel[(1,)](out, torch.tensor([seed]), torch.tensor([position]), ids.int(), N=len(ids), OURS=ours)
    return out


def count_bytes(name: str, num_reqs: int, num_drafts: int, vocab_size: int) -> dict[str, Any]:
    """The bytes that a job of `benchmarks.kernels` moves on bfloat16 logits; the least is to read each row once."""
    inputs = kernels.Inputs(num_reqs, num_drafts, vocab_size, torch.bfloat16)
    call = next(job for job in kernels.JOBS if job.name == name).make(inputs)
    with interpreted.Traffic(inputs.logits) as traffic:
        call()
    least = inputs.logits.nbytes
    moved = traffic.logits_bytes + traffic.other_bytes
    return {"least_bytes": least, "logits_bytes": traffic.logits_bytes, "over_least": moved / least}
