"""Triton's interpreter as an instrument: bytes that kernels move, and vLLM's own kernels on a CPU.

Everything here reaches into the interpreter of Triton 3.9; a version that is built otherwise fails loudly.
"""

import types
from typing import Any

import numpy as np

SECTOR_BYTES = 32


def let_vllm_see_triton() -> None:
    """Make a CPU build of vLLM use Triton; to be called before vLLM is imported.

    vLLM counts Triton as present on a CPU when a backend called "cpu" is registered. The interpreter,
    moreover, refuses integer masks, which the compiler takes and vLLM's kernels use.
    """
    import triton.backends
    from triton.runtime import interpreter

    triton.backends.backends["cpu"] = types.SimpleNamespace(
        driver=types.SimpleNamespace(is_active=lambda: False),
        compiler=types.SimpleNamespace(supports_target=lambda target: False),
    )
    builder = interpreter.InterpreterBuilder

    def with_bool_mask(original: Any, position: int) -> Any:
        def access(self: Any, *args: Any) -> Any:
            mask = args[position]
            if mask is not None and mask.data.dtype != np.bool_:
                mask = interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)
            return original(self, *args[:position], mask, *args[position + 1 :])

        return access

    builder.create_masked_load = with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool_mask(builder.create_masked_store, 2)


class Traffic:
    """Counts, while it is entered, the bytes that interpreted kernels move, in sectors of 32 bytes.

    Logits count at every access, by the sectors that its unmasked lanes touch: a second look at them is
    counted as such. Anything else is small and stays in the L2 cache while kernels look at it, so there each
    sector counts once for being read and once for being written.

    Args:
        logits: the tensor whose accesses are counted.
    """

    def __init__(self, logits: Any) -> None:
        storage = logits.untyped_storage()
        self._bounds = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self._others: dict[str, set[int]] = {"read": set(), "written": set()}
        self.logits_bytes = 0

    @property
    def other_bytes(self) -> int:
        """Bytes of anything but logits, read and written."""
        return SECTOR_BYTES * sum(map(len, self._others.values()))

    def __enter__(self) -> "Traffic":
        from triton.runtime import interpreter

        self._builder = interpreter.InterpreterBuilder
        self._originals = self._builder.create_masked_load, self._builder.create_masked_store
        load, store = self._originals

        def counting_load(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
            self._count(pointers.data, mask, "read")
            return load(builder, pointers, mask, *args)

        def counting_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            self._count(pointers.data, mask, "written")
            return store(builder, pointers, value, mask, *args)

        self._builder.create_masked_load, self._builder.create_masked_store = counting_load, counting_store
        return self

    def __exit__(self, *exception: object) -> None:
        self._builder.create_masked_load, self._builder.create_masked_store = self._originals

    def _count(self, addresses: np.ndarray, mask: Any, access: str) -> None:
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data.astype(np.bool_), addresses.shape)]
        sectors = np.unique(addresses // SECTOR_BYTES)
        first, end = self._bounds
        of_logits = (sectors * SECTOR_BYTES >= first) & (sectors * SECTOR_BYTES < end)
        self.logits_bytes += SECTOR_BYTES * int(of_logits.sum())
        self._others[access].update(sectors[~of_logits].tolist())
