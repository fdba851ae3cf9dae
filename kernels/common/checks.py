"""Argument checks of the kernels' public ops: cheap, and they name the argument."""

from collections.abc import Callable
from typing import Any

import torch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


_checked: set[tuple] = set()
_MOST_CHECKED = 4096


def check_once(check: Callable[[Any], None], arguments: Any) -> None:
    """Run a check of an op's arguments, unless it has passed for arguments of the same kinds.

    A step's checks would take longer than its launches, and nearly all steps have the shapes of an earlier one.

    Args:
        check: raises ValueError for what it doesn't like; it looks at nothing of a tensor but shape, strides and dtype.
        arguments: the op's, a named tuple of tensors, numbers and further named tuples.
    """
    key = check, _kinds(arguments)
    if key in _checked:
        return
    check(arguments)
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(key)


def _kinds(arguments: Any) -> tuple:
    return tuple(
        (value.shape, value.stride(), value.dtype)
        if isinstance(value, torch.Tensor)
        else _kinds(value)
        if isinstance(value, tuple)
        else value
        for value in arguments
    )


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless a tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {allowed}")


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise ValueError unless a tensor has this shape and one of these dtypes."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, *dtypes)


def check_tensors(*wanted: tuple, contiguous: bool = False) -> None:
    """`check_tensor` for each tuple of its arguments; if `contiguous`, the tensors must be that too."""
    for name, tensor, *shape_and_dtypes in wanted:
        check_tensor(name, tensor, *shape_and_dtypes)
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")


def check_logits(name: str, logits: torch.Tensor, num_rows: int) -> None:
    """Raise ValueError unless a tensor is [num_rows, vocab_size >= 1] logits whose rows are contiguous."""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (rows, vocab_size >= 1)")
    check_tensor(name, logits, (num_rows, logits.shape[1]), *LOGITS_DTYPES)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{name} has stride {logits.stride(1)} along the vocabulary, expected 1")
