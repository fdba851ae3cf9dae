"""The corpora of a worker: every rank that drafts loads them, and has the same."""

import hashlib
import logging
import os
from typing import Any

import numpy as np
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_aasd import corpus_names
from vllm_aasd.drafting import corpus_files
from vllm_aasd.drafting.corpora import Corpora, num_pages
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.engine.corpus_names import write_names
from vllm_aasd.engine.ranks import gathered
from vllm_aasd.engine.startup import memory_bytes
from vllm_aasd.kernels.text import num_pages_for

logger = logging.getLogger("vllm.aasd")


class ServerCorpora(Corpora):
    """The corpora of one worker, made by every rank that drafts.

    Args:
        model: the served one.
        config: the speculative config.

    Raises:
        ValueError: a corpus of the settings can't be loaded.
    """

    def __init__(self, model: ModelConfig, config: Any) -> None:
        settings = config.aasd
        self._model = model
        self._names_file = config.aasd_corpora_file
        texts = {name: load(model, name, path) for name, path in settings.corpora or ()}
        spare = 0 if settings.corpora is None else num_pages_for(memory_bytes(settings))
        super().__init__(texts, spare)

    def add_from(self, name: str, path: str) -> list[str]:
        """Add the text at a path, in the place of what has its name.

        Returns:
            The names that there are now.

        Raises:
            ValueError: the name or path isn't allowed, there is no room, or the server wouldn't learn the name.
        """
        if not corpus_names.is_name(name):
            raise ValueError(f"name={name!r} is not allowed: a corpus is named by {corpus_names.ALLOWED_PATHS}")
        self._check_server()
        self.add(name, load(self._model, name, path))
        return self._changed()

    def remove(self, name: str) -> list[str]:
        """Drop a corpus, and return the names of those that stay.

        Raises:
            ValueError: there is none of this name, or the server wouldn't learn that it is gone.
        """
        self._check_server()
        self.drop(name)
        return self._changed()

    def _check_server(self) -> None:
        folder, ranks = os.path.dirname(self._names_file), get_tp_group()
        if any(gathered(bool(folder) and ranks.rank_in_group == 0 and not os.path.isdir(folder), ranks)):
            raise ValueError(
                "corpora can't change while serving, since the first worker isn't on the server's machine: "
                "name them in aasd_corpora"
            )

    def _changed(self) -> list[str]:
        if get_tp_group().rank_in_group == 0:
            write_names(self._names_file, self.names)
        return self.names


def load(model: ModelConfig, name: str, path: str) -> np.ndarray:
    """The token ids of the corpus at a path, ``[n]`` int32 with a -1 after each document. Every rank calls this.

    Raises:
        ValueError: on all ranks, if one can't read it, or has another text.
    """
    try:
        found, token_ids = "", _own(model, name, path)
        found = hashlib.sha256(token_ids.tobytes()).hexdigest()
    except (OSError, ValueError) as error:
        token_ids, found = np.empty(0, np.int32), f"can't be loaded: {error}"
    of_ranks = gathered(found, get_tp_group())
    for other in of_ranks:
        if other.startswith("can't"):
            raise ValueError(f"corpus {name!r} at {path} {other}")
    if len(set(of_ranks)) > 1:
        raise ValueError(f"corpus {name!r} at {path} isn't the same on all nodes")
    return token_ids


def _own(model: ModelConfig, name: str, path: str) -> np.ndarray:
    """What this rank reads and tokenizes, or has tokenized before."""
    documents = corpus_files.read_documents(path)
    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is None:
        raise ValueError("it takes a tokenizer, and skip_tokenizer_init is set")
    key = _tokenizer_key(tokenizer)
    file = corpus_files.cache_path(path, key)
    key = f"{key} {documents.digest()}"
    token_ids = None
    if file is not None:
        try:
            token_ids = corpus_files.load(file, key, model.get_vocab_size())
        except FileNotFoundError:
            pass
        except TensorFileError as error:
            # Also what an edited corpus was before.
            logger.warning("aasd: corpus %r is tokenized again: %s", name, error)
    if token_ids is None:
        token_ids = corpus_files.tokenize(documents, lambda text: tokenizer.encode(text, add_special_tokens=False))
        if file is not None:
            try:
                corpus_files.save(file, token_ids, key)
            except OSError as error:
                logger.warning("aasd: the tokens of corpus %r aren't kept: %s", name, error)
    logger.info(
        "aasd: corpus %r has %d documents of %d tokens, in %d pages; %d files were skipped that aren't UTF-8 text",
        name,
        len(documents.texts),
        len(token_ids) - len(documents.texts),
        num_pages(token_ids),
        documents.num_skipped,
    )
    return token_ids


def _tokenizer_key(tokenizer: Any) -> str:
    """Names the content of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
