"""Ops on tensors whose rows lie further apart than an int32 can say, in a file that is nearly all holes.

For the interpreting process, which computes offsets in the integers that the kernels do.
"""

import tempfile
from typing import Any

import torch


def far_rows(rows: torch.Tensor, stride: int, folder: str) -> torch.Tensor:
    """The same rows, each so many elements after the one before.

    Args:
        rows: ``[num_rows, columns]``.
        stride: elements.
        folder: for the file.
    """
    size = (len(rows) - 1) * stride + rows.shape[1]
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(size * rows.element_size())
        memory = torch.from_file(file.name, shared=True, size=size, dtype=rows.dtype)
    far = memory.as_strided(rows.shape, (stride, 1))
    far.copy_(rows)
    return far


def verify_far(arguments: dict[str, Any], stride: int, folder: str) -> Any:
    """`verify_seeded` of logits in such rows."""
    from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

    return verify_seeded(
        SeededBatch(**{**arguments, "target_logits": far_rows(arguments["target_logits"], stride, folder)})
    )


def align_far(logits: torch.Tensor, token_ids: torch.Tensor, table: torch.Tensor, stride: int, folder: str) -> Any:
    """`align` of logits in such rows, each to the slot of its number."""
    from vllm_aasd.kernels.align import align

    align(far_rows(logits, stride, folder), token_ids, torch.arange(len(logits)), table)
    return table


def draft_far(batch: Any, stride: int, folder: str) -> Any:
    """`draft_batch` from contexts in such rows."""
    from vllm_aasd.kernels.draft.batch import draft_batch

    draft_batch(batch._replace(all_token_ids=far_rows(batch.all_token_ids, stride, folder)))
    return batch.draft_token_ids, batch.num_drafts, batch.survival
