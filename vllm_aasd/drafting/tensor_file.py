"""Files for what belongs to a model: safetensors, which holds no code, written completely or not at all."""

import json
import os
import stat
import uuid
from pathlib import Path

import numpy as np
from safetensors import numpy as tensors_of


class TensorFileError(ValueError):
    """A file can't be used for a model; the text says why."""


def save(path: Path, file_format: str, model_key: str, tensors: dict[str, np.ndarray], mode: int = 0o644) -> None:
    """Write tensors so that ``path`` appears complete or not at all.

    Args:
        path: the file; folders are made.
        file_format: name and version of what it holds.
        model_key: names the content of the model that it belongs to.
        tensors: by name.
        mode: who can read it, as far as the umask allows it: other users' servers, too, by default.

    Raises:
        OSError: the file can't be written.
    """
    content = tensors_of.save(tensors, {"format": file_format, "model": model_key})
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with open(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            # If the machine fails after the replacement, the new file must have its content.
            os.fsync(file.fileno())
        os.replace(writing, path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise


def load(path: Path, file_format: str, model_key: str, names: set[str], max_bytes: int) -> dict[str, np.ndarray]:
    """Read the tensors of a file that `save` wrote for the same model.

    Args:
        path: the file.
        file_format: name and version of what it should hold.
        model_key: names the content of the model that it should belong to.
        names: of the tensors that it should hold.
        max_bytes: the largest such a file can be.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: the file is damaged, foreign, unreadable, or of another model.
    """
    try:
        content = _read(path, max_bytes)
        tensors = tensors_of.load(content)
        # After the tensors, whose reader has checked the header.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (FileNotFoundError, TensorFileError):
        raise
    except Exception as error:  # the reader's own, and numpy's for types that it doesn't know
        raise TensorFileError(f"{path} can't be read: {error}") from error
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != file_format or set(tensors) != names:
        raise TensorFileError(f"{path} isn't a file of the format {file_format!r}")
    if metadata.get("model") != model_key:
        raise TensorFileError(f"{path} was made with another model or other text, or with other weights of it")
    # Copies, because the reader's arrays are read-only, which compiled code doesn't accept.
    return {name: tensor.copy() for name, tensor in tensors.items()}


def _read(path: Path, max_bytes: int) -> bytes:
    # Opening a FIFO without a writer would block.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise TensorFileError(f"{path} can't be read: it is not a regular file")
        if status.st_size > max_bytes:
            raise TensorFileError(
                f"{path} can't be read: it has {status.st_size} bytes, and such a file at most {max_bytes}"
            )
        return file.read(status.st_size)
