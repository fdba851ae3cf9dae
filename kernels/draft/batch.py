"""Draft batch: draft tokens of a batch of requests whose contexts lie on the device, without waiting for it.

It computes the mixture of `vllm_aasd.kernels.draft` for each request, and what known text makes of it. Weights are
added in the same order and in float32, so ids and survival equal the reference's to the bit. The compiled CPU drafter
adds up a position's weights first and may fuse a product with its sum: a score then differs by at most 2^-23 of itself
for each weight in it. There is room for every candidate: none is dropped.

There are no hash tables; the context is scanned (docs/design.md has the steps). One launch serves the batch, with a
program for each part of each context. Every program scans its part for the first draft token, and the last one to
finish drafts. For later tokens it scans the last part again; in the older parts it only follows the matches found
before, as long as they continue like the draft. Shapes, launch and memory do not depend on data, and rows know nothing
of each other. The paged predictions are those of `vllm_aasd.kernels.align`.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_once, check_shape, check_tensor
from vllm_aasd.kernels.draft import NGRAM_SIZES_USED
from vllm_aasd.kernels.text.batch import TextTensors

__all__ = ["MAX_EXCLUDED", "PART", "WINDOW", "DraftBatch", "draft_batch", "draft_workspace", "num_parts"]

WINDOW = 1 << 17
"""Positions before the end of a context that are looked through."""

PART = 1 << 14
"""Positions that one program looks through. Parts are counted from the end of a context."""

MAX_EXCLUDED = 32
"""Ids that end a draft. Models have one placeholder token per modality, and a few for rows and frames."""


def num_parts(max_model_len: int) -> int:
    """In how many parts at most contexts of up to this length are looked through."""
    return -(-min(max_model_len, WINDOW) // PART)


def draft_workspace(
    max_num_reqs: int,
    max_model_len: int,
    max_ngram_size: int,
    max_matches: int,
    top_k: int,
    prior_top_k: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Allocate scratch for batches of up to ``max_num_reqs`` requests.

    Args:
        max_num_reqs: rows.
        max_model_len: of the contexts.
        max_ngram_size: M, the largest n-gram that is looked up, >= 1.
        max_matches: how many of the most recent matches of each n-gram size are used, >= 1.
        top_k: predictions that the alignment table stores of a position; 0 without one.
        prior_top_k: successors that the prior gives of a token; 0 without one.
        device: that of the batch.

    Returns:
        [max_num_reqs, words] int32. Between calls the first word of a row is 0; what the others hold has no meaning.
    """
    words = _workspace_words(max_model_len, max_ngram_size, max_matches, top_k, prior_top_k)
    return torch.zeros((max_num_reqs, words), dtype=torch.int32, device=device)


class DraftBatch(NamedTuple):
    """The arguments of `draft_batch`: what it reads, and below `workspace` what it writes.

    *Slot* is a request's place in the runner's state, *row* its place in the batch.

    Attributes:
        all_token_ids: [max_num_reqs, max_model_len] int32 by slot, rows contiguous, any row stride: the
            contexts, prompt and output. In the device's own memory, since each draft token scans them.
        total_len: [max_num_reqs] int32 by slot, tokens in the context, at most max_model_len. 0 drafts nothing.
        idx_mapping: [num_reqs] int32 or int64, the slot of each row; a negative one drafts nothing.
        table: [num_kv_slots, 1 + 2k] int32, the alignment store, see `vllm_aasd.kernels.align`;
            [0, 1] for none.
        block_tables: [max_num_reqs, max_blocks] int32 by slot, the KV blocks of each context. A position
            whose block lies outside the table has no stored prediction.
        block_size: slots per KV block, >= 1.
        theta, alignment: [M] float32, see `vllm_aasd.kernels.draft.MixtureWeights`.
        no_alignment_discount: [1] float32, see there.
        prior_ids, prior_probs: [prior_vocab_size, kp] int32 and float32, see `vllm_aasd.kernels.draft.Prior`;
            [0, 0] for none.
        vocab_size: ids from it on never become a draft token, >= 1.
        max_matches: how many of the most recent matches of each n-gram size are used, >= 1.
        min_survival: stop before a token whose survival (a probability) would be lower.
        texts: what is known besides the contexts, for as many slots and drafts of at least K tokens; its ``looked_up``,
            ``cells`` and ``found_tokens`` are written in place.
        max_len: [max_num_reqs] int32 by slot, the tokens that a context may reach. No draft goes beyond it, nor takes
            its last place: one token comes without a draft.
        num_sampled: [num_reqs] int32 by row, tokens emitted in this step; a row without any drafts nothing.
        excluded: [MAX_EXCLUDED] int32, ids before which a draft ends, padded with -1.
        longest: the longest draft, 0 to K.
        workspace: of `draft_workspace`, for these sizes and at least num_reqs rows; overwritten.
        draft_token_ids: [num_reqs, K] int64 by row, written in place. Past the drafts of a row stands the last token
            of its context, or 0 if that is empty, so that every column can be fed to the model.
        num_drafts: [max_num_reqs] int32 by slot, written in place: how many of a row's are drafted, 0 to K.
        survival: [max_num_reqs, K] float32 by slot, written in place: the estimated probability that the draft up to
            and including this token is accepted; 0 past the drafts.
        lookups: [3] int64, added to: what was found in the store at the matching positions, see
            `vllm_aasd.kernels.draft.cpu.draft`.
    """

    all_token_ids: torch.Tensor
    total_len: torch.Tensor
    idx_mapping: torch.Tensor
    table: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    theta: torch.Tensor
    alignment: torch.Tensor
    no_alignment_discount: torch.Tensor
    prior_ids: torch.Tensor
    prior_probs: torch.Tensor
    vocab_size: int
    max_matches: int
    min_survival: float
    texts: TextTensors
    max_len: torch.Tensor
    num_sampled: torch.Tensor
    excluded: torch.Tensor
    longest: int
    workspace: torch.Tensor
    draft_token_ids: torch.Tensor
    num_drafts: torch.Tensor
    survival: torch.Tensor
    lookups: torch.Tensor


def draft_batch(batch: DraftBatch) -> None:
    """Draft the likeliest continuation of each request's context, into the batch's own tensors.

    Nothing waits for the device, so lengths and slots are taken as they are: they must be in range. The first
    call on a GPU for tensors of other sizes (K and num_reqs aside) compiles, for seconds; a worker makes it at start.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    check_once(_check, batch)
    _implementation(batch.all_token_ids.device.type).draft_batch(batch)


def _check(batch: DraftBatch) -> None:
    for name in ("block_size", "vocab_size", "max_matches"):
        if getattr(batch, name) < 1:
            raise ValueError(f"{name} is {getattr(batch, name)}, must be at least 1")
    num_reqs, max_num_reqs = batch.idx_mapping.shape[0], batch.all_token_ids.shape[0]
    max_ngram_size = batch.theta.shape[0]
    if max_ngram_size < 1:
        raise ValueError("theta has no entries, expected one per n-gram size")
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    for name, length, dtypes in (
        ("total_len", max_num_reqs, (int32,)),
        ("idx_mapping", num_reqs, (int64, int32)),
        ("theta", max_ngram_size, (float32,)),
        ("alignment", max_ngram_size, (float32,)),
        ("no_alignment_discount", 1, (float32,)),
        ("max_len", max_num_reqs, (int32,)),
        ("num_sampled", num_reqs, (int32,)),
        ("excluded", MAX_EXCLUDED, (int32,)),
        ("num_drafts", max_num_reqs, (int32,)),
        ("lookups", 3, (int64,)),
    ):
        _check_vector(name, getattr(batch, name), length, *dtypes)
    for name, num_rows, dtype in (
        ("all_token_ids", max_num_reqs, int32),
        ("block_tables", max_num_reqs, int32),
        ("workspace", batch.workspace.shape[0], int32),
        ("draft_token_ids", num_reqs, int64),
        ("survival", max_num_reqs, float32),
    ):
        _check_rows(name, getattr(batch, name), num_rows, dtype)
    for name, dtype in (("table", int32), ("prior_ids", int32), ("prior_probs", float32)):
        check_dtype(name, getattr(batch, name), dtype)
    check_shape("prior_probs", batch.prior_probs, tuple(batch.prior_ids.shape))
    for name in ("draft_token_ids", "survival"):
        if not getattr(batch, name).is_contiguous():
            raise ValueError(f"{name} has strides {getattr(batch, name).stride()}, expected contiguous rows")
    check_shape("survival", batch.survival, (max_num_reqs, batch.draft_token_ids.shape[1]))
    if not 0 <= batch.longest <= batch.draft_token_ids.shape[1]:
        raise ValueError(f"longest is {batch.longest}, must lie in [0, {batch.draft_token_ids.shape[1]}]")
    of_texts = tuple(batch.texts.cells.shape[:2])
    if of_texts[0] != max_num_reqs or of_texts[1] < batch.draft_token_ids.shape[1]:
        shape = max_num_reqs, batch.draft_token_ids.shape[1]
        raise ValueError(f"texts is for (slots, draft tokens) {of_texts}, expected {shape}, or longer drafts")

    table, block_size, prior_ids = batch.table, batch.block_size, batch.prior_ids
    if table.ndim != 2 or table.shape[1] % 2 == 0 or not table.is_contiguous():
        raise ValueError(f"table has shape {tuple(table.shape)}, expected contiguous (num_kv_slots, 1 + 2k)")
    if table.shape[0] % block_size:
        raise ValueError(f"table has {table.shape[0]} rows, expected whole blocks of {block_size}")
    top_k, max_model_len = table.shape[1] // 2, batch.all_token_ids.shape[1]
    if top_k and batch.block_tables.shape[1] * block_size < max_model_len:
        raise ValueError(
            f"block_tables has {batch.block_tables.shape[1]} columns of {block_size} positions, "
            f"expected enough for the {max_model_len} of all_token_ids"
        )
    if prior_ids.ndim != 2 or not prior_ids.is_contiguous() or not batch.prior_probs.is_contiguous():
        raise ValueError(f"prior_ids has shape {tuple(prior_ids.shape)}, expected contiguous (vocab_size, k)")
    words = _workspace_words(max_model_len, max_ngram_size, batch.max_matches, top_k, prior_ids.shape[1])
    if batch.workspace.shape[0] < num_reqs or batch.workspace.shape[1] != words:
        shape = tuple(batch.workspace.shape)
        raise ValueError(f"workspace has shape {shape}, expected (at least {num_reqs}, {words})")


def _workspace_words(max_model_len: int, max_ngram_size: int, max_matches: int, top_k: int, prior_top_k: int) -> int:
    # How many programs have ended; for each part of a context, and for all, how many matches there are by size, and
    # where; the candidates, each a token id and the bits of a weight.
    num_lists = (1 + num_parts(max_model_len)) * max_ngram_size
    num_candidates = NGRAM_SIZES_USED * max_matches * (1 + top_k) + prior_top_k
    return 1 + num_lists * (1 + max_matches) + 2 * num_candidates


def _check_vector(name: str, tensor: torch.Tensor, length: int, *dtypes: torch.dtype) -> None:
    check_tensor(name, tensor, (length,), *dtypes)
    if length > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(0)}, expected 1")


def _check_rows(name: str, tensor: torch.Tensor, num_rows: int, dtype: torch.dtype) -> None:
    if tensor.ndim != 2 or tensor.shape[0] != num_rows:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {num_rows} rows")
    check_dtype(name, tensor, dtype)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(1)} along its rows, expected 1")


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.draft import triton

        return triton
    from vllm_aasd.kernels.draft import reference

    return reference
