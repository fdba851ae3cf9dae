"""AlignmentStore: the target's own predictions for context positions, paged like the KV cache."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_aasd.kernels.align import MAX_TOP_K, align, align_merge

_NO_TOKEN = -1


TOP_K = 4
"""Predictions stored per position. In a replay, the likeliest one alone gave 1% fewer tokens a step."""

PREFILL_CHUNK = 256
"""Prompt positions whose logits exist at once: 256 rows of a 152k vocabulary in bfloat16 are 78 MB."""


def _entry_words(top_k: int) -> int:
    return 1 + 2 * top_k


def entry_bytes(top_k: int) -> int:
    """Bytes that a store takes for each KV slot, with `top_k` predictions in it."""
    return 4 * _entry_words(top_k)


class AlignmentStore:
    """Top-k next-token ids and probabilities of every KV slot.

    A slot is the number that the KV cache uses, block * block_size + offset, so an entry lives and moves with
    the KV of its position: a prefix-cache hit finds it, a preempted request's blocks may be overwritten. What a
    block's former owner left must be invalidated when the block gets another. Each entry keeps the id of the token
    at its own position: a reader that asks with another id sees that the entry is of a draft token that was rejected.

    Args:
        num_blocks: blocks of the KV cache, at least 1.
        block_size: slots of a block, at least 1.
        top_k: predictions kept of each position, 1 to 8. A slot takes `entry_bytes` of it.
        device: where the table lives; that of the logits.

    Raises:
        ValueError: a size is out of its range.

    Attributes:
        table: [num_blocks, block_size, 1 + 2 top_k] int32, laid out as in `vllm_aasd.kernels.align`. One
            tensor whose first dimension counts blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, top_k: int, device: torch.device | str) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 1")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        if not 1 <= top_k <= MAX_TOP_K:
            raise ValueError(f"top_k is {top_k}, must lie in [1, {MAX_TOP_K}]")
        self.top_k = top_k
        self.table = torch.zeros((num_blocks, block_size, _entry_words(top_k)), dtype=torch.int32, device=device)
        self.clear()
        self._slots = self.table.view(num_blocks * block_size, _entry_words(top_k))

    @property
    def slots(self) -> torch.Tensor:
        """The table as ``[num_slots, 1 + 2 top_k]`` int32, the same memory."""
        return self._slots

    @property
    def num_slots(self) -> int:
        """Slots of the table, num_blocks * block_size."""
        return self._slots.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return self.table.nbytes

    def invalidate(self, block_ids: Sequence[int]) -> None:
        """Forget the entries of blocks, in the order of the device's work and without waiting for it.

        To be called when blocks are given to a request whose context they don't hold, before it reads or writes there.

        Args:
            block_ids: in any order.

        Raises:
            ValueError: a block outside the table.
        """
        if not block_ids:
            return
        blocks = torch.tensor(block_ids, dtype=torch.int64)
        if not 0 <= int(blocks.min()) <= int(blocks.max()) < len(self.table):
            raise ValueError(
                f"block_ids holds {int(blocks.min())} to {int(blocks.max())}, must lie in [0, {len(self.table)})"
            )
        if self.table.device.type != "cpu":
            blocks = blocks.pin_memory().to(self.table.device, non_blocking=True)
        self.table[:, :, 0].index_fill_(0, blocks, _NO_TOKEN)

    def clear(self) -> None:
        """Forget the entries of all blocks."""
        self.table[:, :, 0] = _NO_TOKEN

    def write(self, logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store the top k of each row at its slot.

        Args:
            logits: [num_rows, vocab_size] float32, bfloat16 or float16, any row stride.
            token_ids: [num_rows] int32, the input token at each row's own position.
            slot_mapping: [num_rows] int64; -1 skips the row, of equal slots the last row stays.

        Raises:
            ValueError: a wrong shape or dtype, or a slot outside the table.
        """
        align(logits, token_ids, slot_mapping, self._slots)

    def write_shards(self, partials: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store the top k of each row from logits that were split over the vocabulary.

        Args:
            partials: [num_ranks, num_rows, 1 + 2 top_k] int32, what `vllm_aasd.kernels.align.align_shard` gave
                of each part.
            token_ids: [num_rows] int32, as for `write`.
            slot_mapping: [num_rows] int64, as for `write`.

        Raises:
            ValueError: a wrong shape or dtype.
        """
        align_merge(partials, token_ids, slot_mapping, self._slots)

    def read(self, token_ids: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look up the entries of context positions.

        Args:
            token_ids: [n] integer, the token that the caller has at each position.
            slots: [n] int64; -1 gives an entry that is not fresh.

        Returns:
            ids: [n, top_k] int32, descending by probability; undefined where not fresh.
            probs: [n, top_k] float32, 0 where not fresh.
            fresh: [n] bool, whether there is an entry and it was written for this token.

        Raises:
            ValueError: shapes differ, or a slot lies outside the table.
        """
        if token_ids.ndim != 1 or token_ids.shape != slots.shape:
            raise ValueError(
                f"token_ids and slots have shapes {tuple(token_ids.shape)} and {tuple(slots.shape)}, "
                "expected the same (n,)"
            )
        if slots.numel() and int(slots.max()) >= self.num_slots:
            raise ValueError(f"slots holds {int(slots.max())}, must lie in [-1, {self.num_slots})")
        entries = self._slots[slots.clamp(min=0)]
        fresh = (slots >= 0) & (token_ids >= 0) & (entries[:, 0] == token_ids)
        probs = entries[:, 1 + self.top_k :].view(torch.float32)
        return entries[:, 1 : 1 + self.top_k], torch.where(fresh[:, None], probs, 0.0), fresh

    def numpy(self) -> np.ndarray:
        """Return the table as [num_slots, 1 + 2 top_k] int32 that shares its memory, for compiled CPU code.

        Raises:
            ValueError: the table is not in CPU memory.
        """
        if self.table.device.type != "cpu":
            raise ValueError(f"the table is on device '{self.table.device}', a numpy view needs 'cpu'")
        return self._slots.numpy()
