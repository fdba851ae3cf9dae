"""A process of its own in which the Triton draft op is interpreted, so that it runs on CPU tensors.

Triton reads TRITON_INTERPRET while it is imported, and the tests' own process may hold it compiled already.
Tensors lie in memory that both processes share: the op's outputs appear in those that were handed over.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def start() -> ProcessPoolExecutor:
    """Start the process; submit `draft_batch` to it. What it raises is raised by the future's `result`."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def draft_batch(*args):
    """Run the Triton path; for the worker."""
    from triton.runtime.interpreter import InterpretedFunction

    from vllm_aasd.kernels import draft_triton

    assert isinstance(draft_triton.draft_kernel, InterpretedFunction), "the kernel is not interpreted"
    draft_triton.draft_batch(*args)


def gpu_path():
    """The module that the dispatcher gives GPU tensors to, and the positions it matches at once."""
    from vllm_aasd.kernels.backends import backend

    module = backend("draft", "cuda")
    return module.__name__, module.TILE


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"
