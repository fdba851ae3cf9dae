"""Contexts made to be as much work for a drafter as they can be."""

from collections.abc import Callable, Iterator

import numpy as np

from vllm_aasd.drafting.drafter import MAX_NGRAM_SIZE
from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels.common.ngram_hash import HASH_MULTIPLIER as MULTIPLIER

_MUTATED = 0.03
_BLOCK = 256
_TRIED = 8192


def one_token(length: int, vocab_size: int) -> np.ndarray:
    """A token repeated: every list of matches is full, and every draft is as long as it may be."""
    return np.full(length, vocab_size // 2, np.int32)


def short_period(length: int, vocab_size: int) -> np.ndarray:
    """Seven different tokens, over and over."""
    return np.resize(_random(7, vocab_size), length)


def de_bruijn(length: int, vocab_size: int) -> np.ndarray:
    """Of two tokens, in which each long run stands once, and each shorter one equally often before each token."""
    symbols = _random(2, vocab_size)
    return np.fromiter((symbols[place] for place in _lyndon((length - 1).bit_length())), np.int32, length)


def near_copies(length: int, vocab_size: int) -> np.ndarray:
    """A block of random tokens repeated, with a few of them changed each time."""
    copies = np.resize(_random(_BLOCK, vocab_size), length)
    rng = np.random.default_rng(2)
    changed = rng.random(length) < _MUTATED
    copies[changed] = rng.integers(0, vocab_size, changed.sum())
    return copies


def hub(length: int, vocab_size: int) -> np.ndarray:
    """Every second token the same, with another one behind it each time."""
    tokens = _random(length, vocab_size)
    tokens[1::2] = vocab_size // 2
    return tokens


def colliding(length: int, vocab_size: int) -> np.ndarray:
    """Made against the index's hash: most runs want to stand in the same few slots, half as many as tokens."""
    mask = np.uint64(SuffixIndex(MAX_NGRAM_SIZE, 0, length).head.shape[1] - 1)
    crowded = np.uint64(length // 2)
    rng = np.random.default_rng(3)
    tokens = np.zeros(length, np.int32)
    for end in range(length):
        tried = rng.integers(0, vocab_size, _TRIED).astype(np.uint64)
        hashed, num_there = tried * np.uint64(MULTIPLIER), np.zeros(len(tried), np.int32)
        for back in range(1, min(MAX_NGRAM_SIZE, end) + 1):
            num_there += ((hashed >> np.uint64(32)) & mask) < crowded
            hashed = (hashed ^ np.uint64(tokens[end - back])) * np.uint64(MULTIPLIER)
        tokens[end] = tried[int(num_there.argmax())]
    return tokens


CONTEXTS: dict[str, Callable[[int, int], np.ndarray]] = {
    "one token": one_token,
    "short period": short_period,
    "de Bruijn, 2 tokens": de_bruijn,
    "near copies": near_copies,
    "hub": hub,
    "colliding": colliding,
}
"""By name; each takes the context's length and the size of the vocabulary, and gives ``[length]`` int32."""


def _random(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def _lyndon(order: int) -> Iterator[int]:
    """The de Bruijn sequence of an order, as the Lyndon words whose length divides it (Fredricksen, Maiorana)."""
    word = [-1]
    while word:
        word[-1] += 1
        if order % len(word) == 0:
            yield from word
        word = [word[place % len(word)] for place in range(order)]
        while word and word[-1] == 1:
            word.pop()
