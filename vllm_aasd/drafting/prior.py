"""The prior on disk: one file per model."""

from pathlib import Path

import numpy as np

from vllm_aasd.drafting import tensor_file
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.kernels.common.cache_folder import cache_folder
from vllm_aasd.kernels.draft import Prior

NUM_SUCCESSORS = 8
"""Successors asked for of a token, the likeliest at temperature 1."""

MAX_SUCCESSORS = 64
"""Most successors kept of a token: a bound on what a file may hold."""

_FORMAT = "vllm-aasd prior, version 4"
# Of the prior's arrays in the file, in the order of its fields.
_KEYS = ("ids", "probs")
_MAX_HEADER_BYTES = 1 << 16
# Sums of rounded probabilities may pass 1 by this much.
_ROUNDING = 1e-3


def cache_path(model_key: str) -> Path | None:
    """Where the prior of a model is kept, see `cache_folder`; None where there is no such folder."""
    folder = cache_folder()
    return None if folder is None else folder / f"prior-{model_key}.safetensors"


def empty(vocab_size: int) -> Prior:
    """The prior of a model that hasn't been asked for any."""
    shape = (vocab_size, min(NUM_SUCCESSORS, vocab_size))
    return Prior(np.full(shape, -1, np.int32), np.zeros(shape, np.float32))


def save(path: Path, prior: Prior, model_key: str) -> None:
    """Write the prior of a model; see `tensor_file.save`."""
    tensor_file.save(path, _FORMAT, model_key, dict(zip(_KEYS, prior, strict=True)))


def load(path: Path, model_key: str, vocab_size: int) -> Prior:
    """Read the prior of a model, and check all that drafting relies on.

    Args:
        path: the file.
        model_key: what names the model's content.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: the file is damaged, foreign, unreadable, or of another model.
    """
    max_bytes = _MAX_HEADER_BYTES + 2 * 4 * vocab_size * MAX_SUCCESSORS
    arrays = tensor_file.load(path, _FORMAT, model_key, set(_KEYS), max_bytes)
    prior = Prior(*(arrays[key] for key in _KEYS))
    _check(path, prior, vocab_size)
    return prior


def _check(path: Path, prior: Prior, vocab_size: int) -> None:
    """Raise TensorFileError unless every array's type, shape and values are such as drafting relies on."""
    num_successors = prior.ids.shape[-1] if prior.ids.ndim else 0
    shape = (vocab_size, min(max(num_successors, 1), MAX_SUCCESSORS))
    for name, found, dtype in zip(_KEYS, prior, (np.int32, np.float32), strict=True):
        if found.dtype != dtype or found.shape != shape:
            raise TensorFileError(
                f"{path} holds {name} of type {found.dtype} and shape {found.shape}, expected {np.dtype(dtype)} and "
                f"{shape}"
            )
    if prior.ids.min() < -1 or prior.ids.max() >= vocab_size:
        raise TensorFileError(f"{path} holds token ids outside of the vocabulary of {vocab_size}")
    # Written so that NaN fails.
    if not (prior.probs.min() >= 0 and prior.probs.sum(axis=1).max() <= 1 + _ROUNDING):
        raise TensorFileError(f"{path} holds values that are no probabilities")
