"""The prior on disk: one safetensors file per model, which can carry no code, written whole or not at all."""

import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vllm_aasd.kernels.mixture import Prior

MAX_SUCCESSORS = 64
"""Most successors kept of a token: the bound on what a file may hold."""

_FORMAT = "vllm-aasd prior, version 1"
# Sums of rounded probabilities may pass 1 by this much.
_ROUNDING = 1e-3


class PriorError(ValueError):
    """A file can't be used as the prior of a model; the text says why."""


def cache_path(model_key: str) -> Path:
    """Where the prior of a model is kept: ``VLLM_AASD_CACHE_ROOT``, by default ``~/.cache/vllm_aasd``.

    Args:
        model_key: what names the model's content.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = os.environ.get("VLLM_AASD_CACHE_ROOT") or os.path.join(home, "vllm_aasd")
    return Path(root) / f"prior-{model_key}.safetensors"


def save(path: Path, prior: Prior, model_key: str) -> None:
    """Write a prior so that ``path`` appears complete or not at all.

    Args:
        path: the file; folders are made.
        prior: what to write.
        model_key: what names the content of the model that it was made with.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(descriptor)
    try:
        save_file(prior._asdict(), name, {"format": _FORMAT, "model": model_key})
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, model_key: str, vocab_size: int) -> Prior:
    """Read the prior of a model, and check all that drafting relies on.

    Args:
        path: the file.
        model_key: what names the model's content.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: there is none.
        PriorError: the file is damaged, foreign, unreadable, or of another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != _FORMAT or names != set(Prior._fields):
                raise PriorError(f"{path} is no file of the format {_FORMAT!r}")
            if metadata.get("model") != model_key:
                raise PriorError(f"{path} was made with another model, or with other weights of it")
            prior = Prior(*(file.get_tensor(name) for name in Prior._fields))
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise PriorError(f"{path} can't be read: {error}") from error
    _check(path, prior, vocab_size)
    return prior


def _check(path: Path, prior: Prior, vocab_size: int) -> None:
    ids, probs = prior
    shape = (vocab_size, ids.shape[-1])
    if ids.shape != shape or probs.shape != shape or not 1 <= shape[1] <= MAX_SUCCESSORS:
        raise PriorError(
            f"{path} holds shapes {ids.shape} and {probs.shape}, expected ({vocab_size}, k) with k from 1 to "
            f"{MAX_SUCCESSORS}"
        )
    if ids.dtype != np.int32 or probs.dtype != np.float32:
        raise PriorError(f"{path} holds {ids.dtype} and {probs.dtype}, expected int32 and float32")
    if ids.min() < -1 or ids.max() >= vocab_size:
        raise PriorError(f"{path} holds token ids outside of the vocabulary of {vocab_size}")
    # Written so that NaN fails.
    if not (probs.min() >= 0 and probs.sum(axis=1).max() <= 1 + _ROUNDING):
        raise PriorError(f"{path} holds values that are no probabilities")
