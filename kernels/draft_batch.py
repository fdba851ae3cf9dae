"""Draft batch: draft tokens of many requests whose contexts lie on the device, without asking the host.

What is computed
    The mixture of `vllm_aasd.kernels.draft`, for each request of a batch: the same votes of the same
    positions, added in the same order in float32. Ids and survival equal the plain twin's to the bit; from
    the compiled CPU drafter they differ only where that fuses a product with its sum, by a relative
    2^-24 a vote, so ids can differ only where two tokens' scores are that close.

How
    There is no index on the device: with one token a step for a GPU to append, a scan of the context is
    cheaper than hash tables that live and grow there. One program drafts one request, start to end, in one
    launch for the batch. For each draft token it

    1. scans the context from its end, a tile at a time. The number of tokens that a position shares with the
       suffix, up to M, settles every order at once; a position goes to the list of each order that it
       matches and that is not full, at the place that the count so far and a cumulative sum over the tile
       give. As lists fill in the order of m, a tile is examined closely only if it holds a position for a
       list that is still open;
    2. lays down the votes in the order in which they are to be added: longest order first, latest position
       first, the successor before the stored predictions, the prior last;
    3. lets each vote be a candidate, which adds up the votes for its token one after the other, and takes the
       largest sum, of equals the earliest vote: that is the tie rule of the mixture.

    Work is bounded by the context, ``ORDERS_USED * max_matches * (1 + k)`` votes and K. Nothing depends on
    data in shape or launch; a request that has stopped leaves its loop.

Memory
    A scan reads 4 bytes a position from the second-level cache (the tokens of a 32k context are 128 KiB, so
    later scans mostly hit the first level), a step's votes at most ``4 max_matches`` entries of
    ``4 + 8k`` bytes. Lists and votes of a request, a few KiB, stay in the first level. The workspace is
    allocated once (`draft_workspace`), and needs no clearing.

Sources
    Those of `vllm_aasd.kernels.draft`. The paged predictions are those of `vllm_aasd.kernels.align`.
"""

import torch

from vllm_aasd.kernels.backends import backend
from vllm_aasd.kernels.checks import check_dtype, check_shape
from vllm_aasd.kernels.draft_cpu import ORDERS_USED

__all__ = ["draft_batch", "draft_workspace"]


def draft_workspace(
    max_num_reqs: int,
    num_orders: int,
    max_matches: int,
    top_k: int,
    prior_top_k: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Allocate scratch for batches of up to ``max_num_reqs`` requests.

    Args:
        max_num_reqs: rows.
        num_orders: M, the longest run of tokens that is looked up, >= 1.
        max_matches: how many of the most recent matches of each order vote, >= 1.
        top_k: predictions that the alignment table stores of a position; 0 without one.
        prior_top_k: successors that the prior gives of a token; 0 without one.
        device: that of the batch.

    Returns:
        [max_num_reqs, words] int32. What it holds between calls has no meaning.
    """
    words = _workspace_words(num_orders, max_matches, top_k, prior_top_k)
    return torch.empty((max_num_reqs, words), dtype=torch.int32, device=device)


def draft_batch(
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    idx_mapping: torch.Tensor,
    table: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    theta: torch.Tensor,
    alignment: torch.Tensor,
    prior_ids: torch.Tensor,
    prior_probs: torch.Tensor,
    vocab_size: int,
    max_matches: int,
    min_survival: float,
    draft_limits: torch.Tensor,
    workspace: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    survival: torch.Tensor,
) -> None:
    """Draft the likeliest continuation of each request's context; the module's docstring has the method.

    *Slot* is a request's place in the runner's state, *row* its place in the batch. Nothing waits for the
    device, so lengths, slots and limits are taken as they are: they must be in range.

    Args:
        all_token_ids: [max_num_reqs, max_model_len] int32 by slot, rows contiguous, any row stride: the
            contexts, prompt and output.
        total_len: [max_num_reqs] int32 by slot, tokens in the context, at most max_model_len. 0 drafts nothing.
        idx_mapping: [num_reqs] int32 or int64, the slot of each row; a negative one drafts nothing.
        table: [num_kv_slots, 1 + 2k] int32, the alignment store, see `vllm_aasd.kernels.align`; [0, 1] for none.
        block_tables: [max_num_reqs, max_blocks] int32 by slot, the KV blocks of each context. A position
            whose block lies outside the table has no stored prediction.
        block_size: slots per KV block, >= 1.
        theta, alignment: [M] float32, see `vllm_aasd.kernels.draft.MixtureWeights`.
        prior_ids, prior_probs: [prior_vocab_size, kp] int32 and float32, see `vllm_aasd.kernels.draft.Prior`;
            [0, 0] for none.
        vocab_size: ids from it on never become a draft token, >= 1.
        max_matches: how many of the most recent matches of each order vote, >= 1.
        min_survival: stop before a token whose survival (a probability) would be lower.
        draft_limits: [num_reqs] int32 by row, the most tokens to draft; values beyond K mean K.
        workspace: of `draft_workspace`, for these sizes and at least num_reqs rows; overwritten.
        draft_token_ids: [num_reqs, K] int64, written in place. Past the drafts of a row stands the last token
            of its context, or 0 if that is empty, so that every column can be fed to the model.
        num_drafts: [num_reqs] int32, written in place: the draft tokens of each row, 0 to K.
        survival: [num_reqs, K] float32, written in place: the estimated probability that the draft up to and
            including this token is accepted; 0 past the drafts.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    num_reqs, max_num_reqs = idx_mapping.shape[0], all_token_ids.shape[0]
    num_orders, top_k = theta.shape[0], (table.shape[-1] - 1) // 2
    for name, value in (("block_size", block_size), ("vocab_size", vocab_size), ("max_matches", max_matches)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    _check_rows("all_token_ids", all_token_ids, max_num_reqs, torch.int32)
    _check_vector("total_len", total_len, max_num_reqs, torch.int32)
    _check_vector("idx_mapping", idx_mapping, num_reqs, torch.int64, torch.int32)
    if table.ndim != 2 or table.shape[1] % 2 == 0 or not table.is_contiguous():
        raise ValueError(f"table has shape {tuple(table.shape)}, expected contiguous (num_kv_slots, 1 + 2k)")
    check_dtype("table", table, torch.int32)
    _check_rows("block_tables", block_tables, max_num_reqs, torch.int32)
    if num_orders < 1:
        raise ValueError("theta has no entries, expected one per order")
    _check_vector("theta", theta, num_orders, torch.float32)
    _check_vector("alignment", alignment, num_orders, torch.float32)
    if prior_ids.ndim != 2 or not prior_ids.is_contiguous() or not prior_probs.is_contiguous():
        raise ValueError(f"prior_ids has shape {tuple(prior_ids.shape)}, expected contiguous (vocab_size, k)")
    check_dtype("prior_ids", prior_ids, torch.int32)
    check_shape("prior_probs", prior_probs, tuple(prior_ids.shape))
    check_dtype("prior_probs", prior_probs, torch.float32)
    _check_vector("draft_limits", draft_limits, num_reqs, torch.int32)
    _check_rows("draft_token_ids", draft_token_ids, num_reqs, torch.int64)
    _check_vector("num_drafts", num_drafts, num_reqs, torch.int32)
    _check_rows("survival", survival, num_reqs, torch.float32)
    check_shape("survival", survival, tuple(draft_token_ids.shape))
    words = _workspace_words(num_orders, max_matches, top_k, prior_ids.shape[1])
    _check_rows("workspace", workspace, workspace.shape[0], torch.int32)
    if workspace.shape[0] < num_reqs or workspace.shape[1] != words:
        shape = tuple(workspace.shape)
        raise ValueError(f"workspace has shape {shape}, expected (at least {num_reqs}, {words})")
    # On CPU the compiled drafter is `draft`, over an index; whole batches there are for tests.
    backend("draft", all_token_ids.device.type, twin_on=("cpu",)).draft_batch(
        all_token_ids,
        total_len,
        idx_mapping,
        table,
        block_tables,
        block_size,
        theta,
        alignment,
        prior_ids,
        prior_probs,
        vocab_size,
        max_matches,
        min_survival,
        draft_limits,
        workspace,
        draft_token_ids,
        num_drafts,
        survival,
    )


def _workspace_words(num_orders: int, max_matches: int, top_k: int, prior_top_k: int) -> int:
    # The lists of matches, then the votes, each a token id and the bits of a weight.
    return num_orders * max_matches + 2 * (ORDERS_USED * max_matches * (1 + top_k) + prior_top_k)


def _check_vector(name: str, tensor: torch.Tensor, length: int, *dtypes: torch.dtype) -> None:
    check_shape(name, tensor, (length,))
    check_dtype(name, tensor, *dtypes)
    if length > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(0)}, expected 1")


def _check_rows(name: str, tensor: torch.Tensor, num_rows: int, dtype: torch.dtype) -> None:
    if tensor.ndim != 2 or tensor.shape[0] != num_rows:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {num_rows} rows")
    check_dtype(name, tensor, dtype)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(1)} along its rows, expected 1")
