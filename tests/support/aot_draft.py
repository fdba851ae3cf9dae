"""Compile the draft kernel for a GPU that isn't there, just as a call of `draft_batch` would launch it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_aasd.kernels import draft_triton
from vllm_aasd.kernels.draft_batch import draft_workspace

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Recorder:
    """Stands where the kernel is, and keeps what it was launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def recorded_launch(target: GPUTarget, top_k: int, prior_top_k: int, num_spec_tokens: int = 8) -> _Recorder:
    """Call `draft_batch` with tensors of a server's shapes, and return the launch it asked for."""
    num_orders, max_matches, num_reqs, vocab_size = 6, 32, 4, 151936
    int32 = {"dtype": torch.int32}
    recorder = _Recorder()
    on_hip = "7.0" if target.backend == "hip" else None
    with (
        mock.patch.object(draft_triton, "draft_kernel", recorder),
        mock.patch.object(torch.version, "hip", on_hip),
    ):
        draft_triton.draft_batch(
            all_token_ids=torch.empty((num_reqs, 32768), **int32),
            total_len=torch.empty(num_reqs, **int32),
            idx_mapping=torch.empty(num_reqs, dtype=torch.int64),
            table=torch.empty((4096 if top_k else 0, 1 + 2 * top_k), **int32),
            block_tables=torch.empty((num_reqs, 2048), **int32),
            block_size=16,
            theta=torch.empty(num_orders),
            alignment=torch.empty(num_orders),
            doubt=torch.empty(1),
            prior_ids=torch.empty((vocab_size if prior_top_k else 0, prior_top_k), **int32),
            prior_probs=torch.empty((vocab_size if prior_top_k else 0, prior_top_k)),
            vocab_size=vocab_size,
            max_matches=max_matches,
            min_survival=0.1,
            draft_limits=torch.empty(num_reqs, **int32),
            workspace=draft_workspace(num_reqs, num_orders, max_matches, top_k, prior_top_k, "cpu"),
            draft_token_ids=torch.empty((num_reqs, num_spec_tokens), dtype=torch.int64),
            num_drafts=torch.empty(num_reqs, **int32),
            survival=torch.empty((num_reqs, num_spec_tokens)),
        )
    return recorder


def specialised(target: GPUTarget, launch: _Recorder) -> tuple[dict, dict, dict, Any]:
    """What Triton's launcher makes of the arguments: signature, constants, attributes and options."""
    kernel, backend = draft_triton.draft_kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, None
    )
    return signature, constants, attributes, options


def compiled(target: GPUTarget, launch: _Recorder, **overrides: Any):
    """The kernel that this launch would run, with launch options replaced by ``overrides``."""
    signature, constants, attributes, options = specialised(target, launch)
    source = ASTSource(draft_triton.draft_kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={**vars(options), **overrides})


def resources(target: GPUTarget, kernel) -> dict[str, int]:
    """Registers a thread, bytes of stack (where NVIDIA's compiler spills to) and what was spilled elsewhere.

    AMD's compiler may also park scalars in the lanes of a vector register, which touches no memory.
    """
    if target.backend == "hip":
        found = dict(re.findall(r"\.(\w+):\s+(\d+)\n", kernel.asm["amdgcn"]))
        return {
            "registers": int(found["vgpr_count"]),
            "stack": int(found["private_segment_fixed_size"]),
            "spilled": int(found["vgpr_spill_count"]),
            "spilled_to_lanes": int(found["sgpr_spill_count"]),
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        done = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout).groups()
    return {"registers": int(registers), "stack": int(stack), "spilled": int(local)}
