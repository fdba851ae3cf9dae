"""Files of what was learnt of a model: safetensors, which carries no code, written whole or not at all."""

import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vllm_aasd.kernels.common.cache_folder import cache_folder

# Sums of rounded probabilities may pass 1 by this much.
_ROUNDING = 1e-3


class TensorFileError(ValueError):
    """A file can't be used for a model; the text says why."""


def cache_path(kind: str, model_key: str) -> Path:
    """Where a file is kept: in ``AASD_CACHE_ROOT``, by default ``~/.cache/vllm_aasd``.

    Args:
        kind: what it holds, such as ``prior``.
        model_key: what names the model's content.
    """
    root = os.environ.get("AASD_CACHE_ROOT") or cache_folder()
    return Path(root) / f"{kind}-{model_key}.safetensors"


def save(path: Path, file_format: str, model_key: str, tensors: dict[str, np.ndarray]) -> None:
    """Write tensors so that ``path`` appears complete or not at all.

    Args:
        path: the file; folders are made.
        file_format: name and version of what it holds.
        model_key: what names the content of the model that it belongs to.
        tensors: by name.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(descriptor)
    try:
        save_file(tensors, name, {"format": file_format, "model": model_key})
        with open(name, "rb") as written:
            # A machine that fails after the replacement must not be left with the new name and no content.
            os.fsync(written.fileno())
        os.replace(name, path)
    except SafetensorError as error:
        # What it makes of a full disk.
        os.unlink(name)
        raise OSError(f"{path} can't be written: {error}") from error
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, file_format: str, model_key: str, names: set[str]) -> dict[str, np.ndarray]:
    """Read the tensors of a file that `save` wrote for the same model.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: the file is damaged, foreign, unreadable, or of another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format or set(file.keys()) != names:
                raise TensorFileError(f"{path} is no file of the format {file_format!r}")
            if metadata.get("model") != model_key:
                raise TensorFileError(f"{path} was made with another model, or with other weights of it")
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise
    # TypeError and AttributeError: tensors of a type that numpy doesn't know, such as bfloat16.
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} can't be read: {error}") from error


def check_predictions(path: Path, ids: np.ndarray, probs: np.ndarray, vocab_size: int) -> None:
    """Check that rows of token ids and probabilities are such.

    Args:
        path: where they come from, for the message.
        ids: ``[n, k]`` int32; -1 for none.
        probs: ``[n, k]`` float32.
        vocab_size: of the model.

    Raises:
        TensorFileError: an id is out of range, or a value is no probability.
    """
    if ids.min() < -1 or ids.max() >= vocab_size:
        raise TensorFileError(f"{path} holds token ids outside of the vocabulary of {vocab_size}")
    # Written so that NaN fails.
    if not (probs.min() >= 0 and probs.sum(axis=1).max() <= 1 + _ROUNDING):
        raise TensorFileError(f"{path} holds values that are no probabilities")
