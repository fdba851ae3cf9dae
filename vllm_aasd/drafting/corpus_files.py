"""Corpora on disk: the text files that an operator names, and their token ids, kept as one file for each."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vllm_aasd.drafting import tensor_file
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.kernels.common.cache_folder import cache_folder

MAX_TOKENS = 1 << 26
"""Of a corpus, at most."""

_FORMAT = "vllm-aasd corpus, version 1"
_KEY = "token_ids"
_MAX_HEADER_BYTES = 1 << 16
# A tokenizer takes much more memory than the text that it is given.
_PIECE_CHARS = 1 << 20


class Documents(NamedTuple):
    """The text files of a corpus.

    Attributes:
        texts: of each file, in the order of their paths.
        num_skipped: other files, and those that are no UTF-8 text.
    """

    texts: list[str]
    num_skipped: int

    def digest(self) -> str:
        """Names the content, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for text in self.texts:
            content = text.encode()
            digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()


def read_documents(path: str) -> Documents:
    """Read a file, or all files of a folder and its folders, but for those whose names begin with a dot.

    Links to folders are not followed.

    Raises:
        OSError: the file or folder isn't there, or can't be read.
    """
    texts, num_skipped = [], 0
    for file in _files(path):
        text = _text_of(file)
        if text is None:
            num_skipped += 1
        elif text:
            texts.append(text)
    return Documents(texts, num_skipped)


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        os.stat(path)
        yield path
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _text_of(path: str) -> str | None:
    """What a file says; None if it is no regular file, can't be read, or isn't UTF-8."""
    try:
        # Opening a FIFO without a writer would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            content = file.read()
        return None if b"\0" in content else content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def tokenize(documents: Documents, encode: Callable[[str], list[int]]) -> np.ndarray:
    """The token ids of documents, ``[n]`` int32 with a -1 after each.

    Args:
        documents: the texts.
        encode: gives a text's token ids, without special ones.

    Raises:
        ValueError: there are more than `MAX_TOKENS`.
    """
    parts, num_tokens = [], 0
    for text in documents.texts:
        for piece in _pieces(text):
            parts.append(np.array(encode(piece), np.int32))
            num_tokens += len(parts[-1])
        parts.append(np.array([-1], np.int32))
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"it has more than {MAX_TOKENS} tokens")
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end with a line, if lines are so short."""
    begin = 0
    while begin < len(text):
        end = begin + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def cache_path(path: str, tokenizer_key: str) -> Path | None:
    """Where the tokens of the corpus at a path are kept; None where there is no such folder."""
    folder = cache_folder()
    name = hashlib.sha256(f"{tokenizer_key} {os.path.realpath(path)}".encode()).hexdigest()[:32]
    return None if folder is None else folder / f"corpus-{name}.safetensors"


def save(path: Path, token_ids: np.ndarray, key: str) -> None:
    """Write tokens so that no other user can read them; see `tensor_file.save`.

    Args:
        path: the file, written over if it is there.
        token_ids: see `tokenize`.
        key: names the documents and the tokenizer.
    """
    tensor_file.save(path, _FORMAT, key, {_KEY: token_ids}, mode=0o600)


def load(path: Path, key: str, vocab_size: int) -> np.ndarray:
    """Read the tokens that were written with the same key.

    Raises:
        FileNotFoundError: there are none.
        TensorFileError: the file is damaged, foreign, unreadable, or of another key.
    """
    max_bytes = _MAX_HEADER_BYTES + 8 * MAX_TOKENS
    token_ids = tensor_file.load(path, _FORMAT, key, {_KEY}, max_bytes)[_KEY]
    is_usable = token_ids.dtype == np.int32 and token_ids.ndim == 1
    if is_usable and len(token_ids):
        is_usable = token_ids[-1] == -1 and token_ids.min() >= -1 and token_ids.max() < vocab_size
    if not is_usable:
        raise TensorFileError(f"{path} doesn't hold the token ids of documents")
    return token_ids
