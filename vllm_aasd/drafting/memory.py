"""What other requests taught: a bounded table, for the process or with a file that outlives it."""

import logging
import threading
import time
from pathlib import Path

import numpy as np

from vllm_aasd.drafting import tensor_file
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.kernels.draft import MOST_REMEMBERED, Prior

logger = logging.getLogger("vllm.aasd")

NUM_ROWS = 1 << 18
"""Runs of tokens that are remembered at most: with `TOP_K` predictions each, 10 MiB."""

TOP_K = 4
"""Predictions kept of each run."""

_FORMAT = "vllm-aasd memory, version 1"
_SAVE_SECONDS = 60.0


def empty_memory(num_rows: int = NUM_ROWS, top_k: int = TOP_K) -> np.ndarray:
    """A memory that has learnt nothing yet.

    Args:
        num_rows: runs of tokens that it can hold, a power of two.
        top_k: predictions of each.

    Returns:
        ``[num_rows, 2 + 2 * top_k]`` int32, see `vllm_aasd.kernels.draft`.
    """
    memory = np.full((num_rows, 2 + 2 * top_k), -1, np.int32)
    memory[:, 1] = 0
    memory[:, 2 + top_k :] = 0
    return memory


def new_memory(prior: Prior | None) -> np.ndarray:
    """A memory that no request has taught: a copy of the prior's runs, or empty where there are none."""
    return prior.runs.copy() if prior is not None and len(prior.runs) else empty_memory()


def load(path: Path, model_key: str, vocab_size: int) -> np.ndarray:
    """Read the memory of a model, and check all that drafting relies on.

    Args:
        path: the file.
        model_key: what names the model's content.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: the file is damaged, foreign, unreadable, or of another model.
    """
    memory = tensor_file.load(path, _FORMAT, model_key, {"memory"})["memory"]
    check(path, memory, vocab_size)
    return memory


def check(path: Path, memory: np.ndarray, vocab_size: int) -> None:
    """Check that a table is a memory on which drafting may rely.

    Args:
        path: where it comes from, for the message.
        memory: the table.
        vocab_size: of the model.

    Raises:
        TensorFileError: it isn't.
    """
    shape = (NUM_ROWS, 2 + 2 * TOP_K)
    if memory.shape != shape or memory.dtype != np.int32:
        raise TensorFileError(f"{path} holds {memory.dtype} of shape {memory.shape}, expected int32 of {shape}")
    if memory[:, 1].min() < 0 or memory[:, 1].max() > MOST_REMEMBERED:
        raise TensorFileError(f"{path} holds counts outside of 0 to {MOST_REMEMBERED}")
    probs = memory[:, 2 + TOP_K :].view(np.float32)
    tensor_file.check_predictions(path, memory[:, 2 : 2 + TOP_K], probs, vocab_size)


class MemoryFile:
    """Writes a memory now and then, beside the serving: a copy is made in the step, the rest in a thread.

    Args:
        path: the file.
        model_key: what names the model's content.
        memory: the table; it goes on changing.
    """

    def __init__(self, path: Path, model_key: str, memory: np.ndarray) -> None:
        self._path = path
        self._model_key = model_key
        self._memory = memory
        self._saved = time.monotonic()
        self._writer: threading.Thread | None = None

    def save_now_and_then(self) -> None:
        """To be called often; writes at most once a minute, and never waits for the disk."""
        now = time.monotonic()
        if now - self._saved < _SAVE_SECONDS or (self._writer is not None and self._writer.is_alive()):
            return
        self._saved = now
        self._writer = threading.Thread(target=self._write, args=(self._memory.copy(),), daemon=True)
        self._writer.start()

    def save(self) -> None:
        """Write, and wait until it is done: for the end of a server."""
        if self._writer is not None:
            self._writer.join()
        self._write(self._memory)

    def _write(self, memory: np.ndarray) -> None:
        try:
            tensor_file.save(self._path, _FORMAT, self._model_key, {"memory": memory})
        except OSError as error:
            logger.warning("aasd: the memory was not written to %s: %s", self._path, error)
