"""The draft kernel compiled for GPUs that are not here, from the very launch that `draft_batch` makes."""

import os

import pytest

# Compiling needs the kernel itself, not the stand-in that the interpreter makes of it.
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import aot_draft
from aot_draft import TARGETS

SIZES = [(0, 0), (2, 8), (4, 8)]


def launched(name, top_k=2, prior_top_k=8, **shape):
    target = TARGETS[name]
    return target, aot_draft.recorded_launch(target, top_k, prior_top_k, **shape)


@pytest.mark.parametrize(("top_k", "prior_top_k"), SIZES)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_spilled_to_memory(name, top_k, prior_top_k):
    target, launch = launched(name, top_k, prior_top_k)
    used = aot_draft.resources(target, aot_draft.compiled(target, launch))
    assert used["stack"] == 0 and used["spilled"] == 0, used
    # Two programs fit on a multiprocessor: 2 * 256 threads * 128 registers is the register file of an NVIDIA
    # GPU; a SIMD unit of CDNA3 has 512 registers a lane for its two waves.
    assert used["registers"] <= 128, used


def test_a_spill_would_be_seen():
    target, launch = launched("sm_90")
    assert aot_draft.resources(target, aot_draft.compiled(target, launch, maxnreg=32))["stack"] > 0


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_lists_and_votes_are_fenced(name):
    """Threads read what others wrote to memory: twice, and each time behind a barrier for all of memory."""
    target, launch = launched(name)
    kernel = aot_draft.compiled(target, launch)
    assert kernel.asm["ttgir"].count("ttg.barrier all") == 2
    # NVIDIA's read-only and AMD's scalar cache do not see stores of the same kernel: no load in the loop over
    # draft tokens may go through them.
    if target.backend == "cuda":
        assert "ld.global" in kernel.asm["ptx"] and "ld.global.nc" not in kernel.asm["ptx"]
    else:
        before, _, loop = kernel.asm["amdgcn"].partition("s_barrier")
        assert "s_load_dword" in before
        assert "s_load_dword" not in loop and "s_buffer_load" not in loop


def test_divisions_are_rounded_as_the_twins():
    target, launch = launched("sm_90")
    ptx = aot_draft.compiled(target, launch).asm["ptx"]
    assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx


def test_the_grid_is_a_program_for_each_request():
    assert launched("sm_90")[1].grid == (4,)


def test_steps_that_draft_less_run_the_same_kernel():
    target, launch = launched("sm_90")
    kernels = {
        str(aot_draft.specialised(target, launched("sm_90", num_spec_tokens=k)[1])[:3]) for k in (1, 5, 8, 16)
    }
    assert kernels == {str(aot_draft.specialised(target, launch)[:3])}
