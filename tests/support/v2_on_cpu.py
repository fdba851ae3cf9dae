"""Lets vLLM's V2 model runner serve on a CPU, its Triton kernels and ours interpreted. For tests only.

What it shows is the runner's logic with its real kernels' semantics: no asynchronous scheduling, no CUDA graphs,
no compiled kernel, no speed.
"""

import os
import types

import numpy as np


def prepare() -> None:
    """Set this process up; to be called before vLLM or Triton is imported."""
    # Triton decides while it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter as our_interpreter
    import triton.backends
    from triton.runtime import interpreter

    # vLLM counts Triton as present on a CPU build where a backend called "cpu" is registered.
    triton.backends.backends["cpu"] = types.SimpleNamespace(
        driver=types.SimpleNamespace(is_active=lambda: False),
        compiler=types.SimpleNamespace(supports_target=lambda target: False),
    )
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = _with_bool_mask(builder.create_masked_store, 2)
    our_interpreter._patch_language_once()


def _with_bool_mask(original, position):
    """The interpreter refuses integer masks, which the compiler takes and vLLM's kernels use."""
    from triton.runtime import interpreter

    def access(self, *args):
        mask = args[position]
        if mask is not None and mask.data.dtype != np.bool_:
            mask = interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)
        return original(self, *args[:position], mask, *args[position + 1 :])

    return access
