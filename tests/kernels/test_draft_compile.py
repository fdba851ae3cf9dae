"""The draft kernel compiled for GPUs that are not here, from the very launch that `draft_batch` makes."""

import re

import pytest
import torch

from benchmarks.kernels import Inputs, draft
from benchmarks.launches import TARGETS, build, compiled_kernel, recorded


def launched(target, top_k=2, prior_top_k=8, num_reqs=4, **shape):
    inputs = Inputs(num_reqs, 0, 151936, torch.bfloat16)
    (launch,) = recorded(draft(top_k, prior_top_k, **shape)(inputs), TARGETS[target])
    return launch


@pytest.mark.parametrize(("top_k", "prior_top_k"), [(0, 0), (2, 8), (4, 8)])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_to_memory(target, top_k, prior_top_k):
    built = build(launched(target, top_k, prior_top_k), TARGETS[target])
    assert built.stack_bytes == 0 and built.spill_bytes == 0, built
    # A SIMD unit of CDNA3 has 512 registers a lane for its two waves. On an NVIDIA GPU, whose register file is that of
    # 256 threads with 256 registers, two programs fit on a multiprocessor with 128, which stored predictions exceed.
    assert built.registers <= {"gfx942": 256, "sm_80": 168}.get(target, 168 if top_k else 128), built


def test_a_spill_would_be_seen():
    assert build(launched("sm_90"), TARGETS["sm_90"], maxnreg=32).stack_bytes > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_matches_and_candidates_are_fenced(target):
    """Threads read what others wrote to memory, each time after a barrier for all of memory."""
    kernel = compiled_kernel(launched(target), TARGETS[target])
    assert kernel.asm["ttgir"].count("ttg.barrier all") == 4
    # NVIDIA's read-only and AMD's scalar cache do not see stores of the same kernel: no load in the loop over
    # draft tokens may go through them.
    if target == "sm_90":
        assert "ld.global" in kernel.asm["ptx"] and "ld.global.nc" not in kernel.asm["ptx"]
    else:
        before, _, loop = kernel.asm["amdgcn"].partition("s_barrier")
        assert "s_load_dword" in before and "s_buffer_load" not in loop
        # The kernel's own arguments, which nobody stores.
        assert set(re.findall(r"s_load_dword\w* \S+ (\S+),", loop)) == {"s[0:1]"}


def test_divisions_are_rounded_as_the_references():
    ptx = compiled_kernel(launched("sm_90"), TARGETS["sm_90"]).asm["ptx"]
    assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx


def test_the_grid_is_a_program_for_each_part_of_each_context():
    launch = launched("sm_90")
    assert launch.grid == (4, 8)
    # What one program has stored another reads, after this.
    assert "atom.global.gpu.acq_rel.add.u32" in compiled_kernel(launch, TARGETS["sm_90"]).asm["ptx"]


def test_steps_that_draft_less_run_the_same_kernel():
    kernels = {str(launched("sm_90", num_spec_tokens=k).specialization(TARGETS["sm_90"])[1:]) for k in (1, 5, 8, 16)}
    assert len(kernels) == 1
