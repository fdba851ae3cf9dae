"""AlignmentStore: the target's own predictions at context positions, paged like the KV cache."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_aasd.kernels.align import MAX_TOP_K, align, align_merge

TOP_K = 4
"""Predictions stored per position. In a replay, the likeliest one alone gave 1% fewer tokens per step."""

PREFILL_CHUNK = 256
"""Prompt positions whose logits exist at once: 256 rows of a 152k vocabulary in bfloat16 are 78 MB."""

_NO_TOKEN = -1


def entry_bytes(top_k: int) -> int:
    """Bytes of a store for each KV slot, with `top_k` predictions."""
    return 4 * (1 + 2 * top_k)


class AlignmentStore:
    """Top-k next-token ids and probabilities of every KV slot.

    A slot is the number that the KV cache uses, block * block_size + offset, so an entry shares the fate of the KV of
    its position: a prefix-cache hit finds it, and a preempted request's may be overwritten. Entries of a block must be
    invalidated when it gets another owner. Each entry has the id of the token at its own position, which tells a reader
    that the entry is of a rejected draft token.

    Args:
        num_blocks: blocks of the KV cache, at least 1.
        block_size: slots of a block, at least 1.
        top_k: predictions per position, 1 to 8.
        device: where the table lives; that of the logits.

    Raises:
        ValueError: a size is out of its range.

    Attributes:
        table: [num_blocks, block_size, 1 + 2 top_k] int32, laid out as in `vllm_aasd.kernels.align`. One
            tensor whose first dimension counts blocks.
        slots: [num_blocks * block_size, 1 + 2 top_k] int32, the same memory.
    """

    def __init__(self, num_blocks: int, block_size: int, top_k: int, device: torch.device | str) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 1")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        if not 1 <= top_k <= MAX_TOP_K:
            raise ValueError(f"top_k is {top_k}, must lie in [1, {MAX_TOP_K}]")
        self.table = torch.zeros((num_blocks, block_size, 1 + 2 * top_k), dtype=torch.int32, device=device)
        self.slots = self.table.view(num_blocks * block_size, 1 + 2 * top_k)
        self.clear()

    def invalidate(self, block_ids: Sequence[int]) -> None:
        """Clear the entries of blocks, in the order of the device's work and without waiting for it.

        To be called when blocks are given to a request whose context they don't have, before it reads or writes there.

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
        """Clear the entries of all blocks."""
        self.table[:, :, 0] = _NO_TOKEN

    def write(self, logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store the top k of each row at its slot.

        Args:
            logits: [num_rows, vocab_size] float32, bfloat16 or float16, any row stride.
            token_ids: [num_rows] int32, the input token at each row's own position.
            slot_mapping: [num_rows] int64; -1 skips the row; of rows with the same slot the last one stays.

        Raises:
            ValueError: a wrong shape or dtype, or a slot outside the table.
        """
        align(logits, token_ids, slot_mapping, self.slots)

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
        align_merge(partials, token_ids, slot_mapping, self.slots)

    def numpy(self) -> np.ndarray:
        """Return the table as [num_slots, 1 + 2 top_k] int32 that shares its memory, for compiled CPU code.

        Raises:
            ValueError: the table is not in CPU memory.
        """
        if self.table.device.type != "cpu":
            raise ValueError(f"the table is on device '{self.table.device}', a numpy view needs 'cpu'")
        return self.slots.numpy()
