"""The prior on disk: one file per model."""

from pathlib import Path

import numpy as np

from vllm_aasd.drafting import memory, tensor_file
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.kernels.draft import Prior

MAX_SUCCESSORS = 64
"""Most successors kept of a token: the bound on what a file may hold."""

_FORMAT = "vllm-aasd prior, version 2"


def cache_path(model_key: str) -> Path:
    """Where the prior of a model is kept; see `tensor_file.cache_path`."""
    return tensor_file.cache_path("prior", model_key)


def save(path: Path, prior: Prior, model_key: str) -> None:
    """Write the prior of a model; see `tensor_file.save`."""
    tensor_file.save(path, _FORMAT, model_key, prior._asdict())


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
    prior = Prior(**tensor_file.load(path, _FORMAT, model_key, set(Prior._fields)))
    ids, probs, runs = prior
    shape = (vocab_size, ids.shape[-1] if ids.ndim else 0)
    if ids.shape != shape or probs.shape != shape or not 1 <= shape[1] <= MAX_SUCCESSORS:
        raise TensorFileError(
            f"{path} holds shapes {ids.shape} and {probs.shape}, expected ({vocab_size}, k) with k from 1 to "
            f"{MAX_SUCCESSORS}"
        )
    if ids.dtype != np.int32 or probs.dtype != np.float32:
        raise TensorFileError(f"{path} holds {ids.dtype} and {probs.dtype}, expected int32 and float32")
    tensor_file.check_predictions(path, ids, probs, vocab_size)
    if runs.dtype != np.int32 or runs.size:
        memory.check(path, runs, vocab_size)
    return prior
