"""The suffix index of one request: where in its context each recent run of tokens stood before."""

import numpy as np

from vllm_aasd.kernels import draft as draft_op

_SMALLEST_CAPACITY = 256


class SuffixIndex:
    """Grows with the request, in amortised constant time a token; never rescans the context.

    Args:
        num_orders: the longest run of tokens that is looked up, >= 1.
        room: draft tokens that a caller may write behind the context.
        expected_length: tokens that are known to come, so that a prompt causes no growing.

    Attributes:
        tokens: ``[capacity + room]`` int32; the context is the first `length` of it.
        prev: ``[num_orders, capacity]`` int32, see `vllm_aasd.kernels.draft`.
        head: ``[num_orders, 2 * capacity]`` int32, see `vllm_aasd.kernels.draft`.
        length: tokens in the context.
    """

    def __init__(self, num_orders: int, room: int, expected_length: int = 0) -> None:
        capacity = _capacity_for(expected_length)
        self._room = room
        self._indexed = 0
        self.length = 0
        self.tokens = np.empty(capacity + room, np.int32)
        self.prev = np.full((num_orders, capacity), -1, np.int32)
        self.head = np.full((num_orders, 2 * capacity), -1, np.int32)

    def extend(self, token_ids: np.ndarray) -> None:
        """Append tokens to the context.

        Args:
            token_ids: ``[n]`` int32.
        """
        length = self.length + len(token_ids)
        if length > self.prev.shape[1]:
            self._grow(_capacity_for(length))
        self.tokens[self.length : length] = token_ids
        self.length = length
        self._indexed = draft_op.extend_index(self.tokens, self.prev, self.head, self._indexed, length)

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
        return self.tokens.nbytes + self.prev.nbytes + self.head.nbytes

    def _grow(self, capacity: int) -> None:
        num_orders = self.prev.shape[0]
        tokens = np.empty(capacity + self._room, np.int32)
        tokens[: self.length] = self.tokens[: self.length]
        prev = np.full((num_orders, capacity), -1, np.int32)
        prev[:, : self._indexed] = self.prev[:, : self._indexed]
        head = np.full((num_orders, 2 * capacity), -1, np.int32)
        draft_op.rehash(tokens, self.head, head)
        self.tokens, self.prev, self.head = tokens, prev, head


def _capacity_for(length: int) -> int:
    return max(_SMALLEST_CAPACITY, 1 << (length - 1).bit_length() if length > 0 else 0)
