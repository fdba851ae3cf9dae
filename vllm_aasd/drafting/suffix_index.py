"""The suffix index of one request: where in its context each recent n-gram stood before."""

import numpy as np

from vllm_aasd.kernels.draft.index_cpu import extend_index

_SMALLEST_CAPACITY = 256

_GROWING_SHARE = 8
"""Tables are replaced by larger ones while their last eighth fills."""


class SuffixIndex:
    """Grows with the request, at a bounded cost for each token; never rescans the context at once.

    Tables can't be enlarged in place. So while the last eighth of them fills, tables of twice the size are prepared, a
    share with every token: cleared first, then filled from the beginning of the context. When they are needed, they are
    ready.

    Args:
        max_ngram_size: the largest n-gram that is looked up, >= 1.
        room: draft tokens that a caller may write after the context.
        expected_length: tokens that are known to come, so that a prompt causes no growing.

    Attributes:
        tokens: ``[capacity + room]`` int32; the context is the first `length` of it.
        prev: ``[max_ngram_size, capacity]`` int32, see `vllm_aasd.kernels.draft`.
        head: ``[max_ngram_size, 2 * capacity]`` int32, see `vllm_aasd.kernels.draft`.
        length: tokens in the context.
    """

    def __init__(self, max_ngram_size: int, room: int, expected_length: int = 0) -> None:
        self._max_ngram_size, self._room = max_ngram_size, room
        self.length = 0
        self._tables = _Tables(max_ngram_size, _capacity_for(expected_length), room)
        self._tables.clear(1.0)
        self._larger: _Tables | None = None

    @property
    def tokens(self) -> np.ndarray:
        return self._tables.tokens

    @property
    def prev(self) -> np.ndarray:
        return self._tables.prev

    @property
    def head(self) -> np.ndarray:
        return self._tables.head

    def extend(self, token_ids: np.ndarray) -> None:
        """Append tokens to the context.

        Args:
            token_ids: ``[n]`` int32.
        """
        length = self.length + len(token_ids)
        while length > self._tables.capacity:
            # As many tokens at once as only a prompt has; else the larger tables are made by now.
            self._tables, self._larger = self._enlarge(1.0), None
        self._tables.tokens[self.length : length] = token_ids
        self.length = length
        self._tables.enter(length)
        last_share = self._tables.capacity // _GROWING_SHARE
        begun = length - (self._tables.capacity - last_share)
        if begun > 0:
            self._enlarge(begun / last_share)

    def continues_to(self, token_ids: np.ndarray) -> bool:
        """Whether ``token_ids`` (``[n]`` int32) can be reached by `extend`, judged by the last tokens it shares.

        Eight tokens are compared, not all: a request's context only grows, so anything else is a request that
        was given another context under the same id.
        """
        first = max(self.length - 8, 0)
        return len(token_ids) >= self.length and np.array_equal(
            token_ids[first : self.length], self.tokens[first : self.length]
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._tables.nbytes + (self._larger.nbytes if self._larger is not None else 0)

    def _enlarge(self, share: float) -> "_Tables":
        """Advance the move to larger tables, which it returns, to this share: the first half is clearing them."""
        if self._larger is None:
            self._larger = _Tables(self._max_ngram_size, 2 * self._tables.capacity, self._room)
        self._larger.clear(min(2 * share, 1.0))
        known = int(max(2 * share - 1, 0.0) * self.length)
        self._larger.tokens[self._larger.length : known] = self._tables.tokens[self._larger.length : known]
        self._larger.enter(known)
        return self._larger


class _Tables:
    """The arrays of an index, of one capacity: what `SuffixIndex` says of them, and how far they are filled."""

    __slots__ = ("_cleared", "_entered", "capacity", "head", "length", "prev", "tokens")

    def __init__(self, max_ngram_size: int, capacity: int, room: int) -> None:
        self.capacity = capacity
        self.tokens = np.empty(capacity + room, np.int32)
        # A position's entries are written before anything leads to it; those of n-grams longer than the context so
        # far, never.
        self.prev = np.empty((max_ngram_size, capacity), np.int32)
        self.prev[:, :max_ngram_size] = -1
        self.head = np.empty((max_ngram_size, 2 * capacity), np.int32)
        self.length = self._entered = self._cleared = 0

    def clear(self, share: float) -> None:
        """Have this share of the table of n-grams cleared."""
        last = int(share * self.head.size)
        self.head.reshape(-1)[self._cleared : last] = -1
        self._cleared = max(last, self._cleared)

    def enter(self, length: int) -> None:
        """Enter what is known of the first ``length`` tokens."""
        self._entered = extend_index(self.tokens, self.prev, self.head, self._entered, length)
        self.length = length

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.prev.nbytes + self.head.nbytes


def _capacity_for(length: int) -> int:
    """A power of two that leaves room to make larger tables while it fills."""
    capacity = _SMALLEST_CAPACITY
    while capacity - capacity // _GROWING_SHARE < length:
        capacity *= 2
    return capacity
