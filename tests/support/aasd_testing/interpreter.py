"""A process in which Triton kernels run interpreted, on CPU tensors; run as a module, this is that process.

Triton decides at import whether it interprets, so a test session that also compiles kernels needs a second process.
"""

import importlib
import warnings
from typing import Any

from aasd_testing.process import Process, serve


class Interpreter(Process):
    """The interpreting process."""

    def __init__(self) -> None:
        super().__init__("aasd_testing.interpreter", {"TRITON_INTERPRET": "1"})


def backend_name(op: str) -> str:
    """The module that implements an op, by its module's name, on CPU tensors."""
    return importlib.import_module(f"vllm_aasd.kernels.{op}")._implementation("cpu").__name__


def verify_and_state(arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What `verify_seeded` gives, and the state and the totals that it leaves behind."""
    from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

    return verify_seeded(SeededBatch(**arguments)), arguments["policies"].state, arguments["totals"]


def _patch_language_once() -> None:
    """Spare the interpreter a third of its time: it looks through triton.language for what it has to replace
    not only at each launch but at each call of a device function, where nothing is left to replace."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    patched: set[int] = set()

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        is_launch = not patched
        patched.add(id(fn.__globals__))
        scope = original(fn)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch


if __name__ == "__main__":
    # numpy warns where the interpreter computes what a kernel goes on to discard.
    warnings.simplefilter("ignore")
    import torch

    _patch_language_once()
    torch.set_num_threads(1)
    # Fills uninitialised memory with NaN and the largest integer, so that an unwritten output shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    serve()
