"""Which tokens of a context the draft model has read, by KV slot.

The draft model runs only where it is needed, so its part of the KV cache has gaps: of prompts that text drafts sufficed
for, and of what was accepted while it wasn't asked. A slot whose token isn't known to have been read with the same
context before it is read again.
"""

from collections.abc import Sequence

import numpy as np

_NO_TOKEN = -1


class ComputedTokens:
    """The token that the draft model has read into each KV slot.

    A slot is block * block_size + offset, as in the KV cache. So requests that share a block through the prefix cache
    share what was read into it, and a preempted request finds what is left of its own.

    Args:
        num_blocks: blocks of the KV cache.
        block_size: slots of a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tokens = np.full(num_blocks * block_size, _NO_TOKEN, np.int32)

    def slots(self, blocks: np.ndarray, start: int, end: int) -> np.ndarray:
        """The slots of a request's positions.

        Args:
            blocks: ``[n]`` int32, its blocks in order.
            start, end: the positions, ``end`` excluded; all within the blocks.

        Returns:
            ``[end - start]`` int64.
        """
        positions = np.arange(start, end)
        return blocks[positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size

    def num_read(self, token_ids: np.ndarray, blocks: np.ndarray) -> int:
        """How many tokens of a context are read, from its beginning; what was read after them is forgotten.

        It was read after other tokens, of a draft that was rejected, and may not count once these are replaced.

        Args:
            token_ids: ``[n]`` int32, the context.
            blocks: ``[m]`` int32, the request's blocks.
        """
        slots = self.slots(blocks, 0, len(blocks) * self.block_size)
        known = slots[: len(token_ids)]
        differs = self._tokens[known] != token_ids[: len(known)]
        count = int(differs.argmax()) if differs.any() else len(known)
        self._tokens[slots[count:]] = _NO_TOKEN
        return count

    def note(self, token_ids: np.ndarray, slots: np.ndarray) -> None:
        """Note that tokens have been read, each after all of its context.

        Args:
            token_ids: ``[n]`` int32.
            slots: ``[n]`` int64, where.
        """
        self._tokens[slots] = token_ids

    def invalidate(self, blocks: Sequence[int]) -> None:
        """Forget what was read into blocks that are given to another request."""
        if blocks:
            self._tokens.reshape(-1, self.block_size)[list(blocks)] = _NO_TOKEN

    def clear(self) -> None:
        """Forget everything."""
        self._tokens.fill(_NO_TOKEN)
