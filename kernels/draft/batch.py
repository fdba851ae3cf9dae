"""Draft batch: draft tokens of many requests whose contexts lie on the device, without asking the host.

What is computed
    The mixture of `vllm_aasd.kernels.draft`, with a memory that doesn't learn, for each request of a batch: the same votes of the same
    positions, each token's added in the same order in float32, so ids and survival equal the plain twin's to
    the bit. The compiled CPU drafter adds up a position's votes first, and may fuse a vote's product with its
    sum: a score then differs by at most 2^-23 of itself for each vote in it, and ids only where two tokens
    are as close as that. There is room for every vote: none is dropped.

How
    The CPU drafter keeps hash tables that grow with the context. On a device a scan of the context is cheaper
    than such tables are to keep: its tokens lie there anyway, and nothing has to be allocated, grown, moved
    with a request or undone. One program drafts for one request from start to end, in one launch for the
    batch. For each draft token it

    1. scans the context from its end, a tile at a time. How many tokens a position shares with the suffix
       settles every order at once. The position goes on the list of each order that it matches, at the place
       given by the count so far and a cumulative sum over the tile, which is its rank from the most recent.
       A position that matches m + 1 tokens matches m, so lists fill in the order of m, and a tile without a
       position for an open list costs no more than the comparison;
    2. writes down the votes in the order in which they are to be added: longest order first, latest position
       first, its stored predictions after its successor, the prior at the end, of runs before that of the last token;
    3. lets each vote stand for its token, add up the votes for that token one after the other, and takes the
       largest sum, of equals the earliest vote: this is the tie rule of the mixture.

    Work is bounded by the context, the votes and K; shapes, launch and memory do not depend on data.
    A draft token's scan compares at most M tokens at each position, and turns to an order's list only in a tile that
    adds to it: at most M max_matches times, whatever the text. So the worst of all contexts of a length is one
    that drafts all K tokens with every list full, such as one token repeated; the cost below is given for K = 8.
    Rows know nothing of each other.

Memory
    A scan reads 4 bytes a position, the tokens before a position only where it matches so far. The tokens of
    a 32k context are 128 KiB: the first scan brings them from memory, later ones find most of them in the
    first-level cache (H100: 256 KiB, less 8 of shared memory). A vote reads at most one entry of 4 + 8k
    bytes. Lists and votes are 3.9 KiB a request at M = 6, 32 matches, k = 2 and a prior of 8, live in the
    first level, and are allocated once (`draft_workspace`).

Cost
    An estimate for an H100 at 1.7 GHz from the compiled code (sm_90, k = 2, prior 8); no GPU was at hand. A
    tile of 1024 positions takes 240 instructions of each of 8 warps, 0.3 us on the four schedulers of a
    multiprocessor. A vote takes 9, so 130 votes (one full list and a few longer matches) 1.4 us, and the most
    there can be, 400, 8 us. Latencies of dependent reads and barriers are about 2 us a token. A draft of 8
    tokens so takes, with the launch,

        context     1k       8k       32k      128k
        estimate    35 us    55 us    120 us   350 us    (most votes in every step: 55 us more)

    for any batch up to the 132 multiprocessors, 64 included: two programs fit on each, and 64 first scans of
    32k read 8 MiB, 3 us of the memory's bandwidth. A step of an 8B model in bfloat16 takes 5 ms at least, so
    splitting a context over several programs, with a wait across the device for each draft token, is not
    worth it.

Sources
    Those of `vllm_aasd.kernels.draft`. The paged predictions are those of `vllm_aasd.kernels.align`.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_shape
from vllm_aasd.kernels.draft import LONGEST_REMEMBERED, ORDERS_USED, SHORTEST_REMEMBERED

__all__ = ["draft_batch", "draft_workspace"]


def draft_workspace(
    max_num_reqs: int,
    num_orders: int,
    max_matches: int,
    top_k: int,
    prior_top_k: int,
    remembered: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Allocate scratch for batches of up to ``max_num_reqs`` requests.

    Args:
        max_num_reqs: rows.
        num_orders: M, the longest run of tokens that is looked up, >= 1.
        max_matches: how many of the most recent matches of each order vote, >= 1.
        top_k: predictions that the alignment table stores of a position; 0 without one.
        prior_top_k: successors that the prior gives of a token; 0 without one.
        remembered: predictions that it gives of a run; 0 without.
        device: that of the batch.

    Returns:
        [max_num_reqs, words] int32. What it holds between calls has no meaning.
    """
    words = _workspace_words(num_orders, max_matches, top_k, prior_top_k, remembered)
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
    doubt: torch.Tensor,
    memory_weights: torch.Tensor,
    prior_ids: torch.Tensor,
    prior_probs: torch.Tensor,
    runs: torch.Tensor,
    vocab_size: int,
    max_matches: int,
    min_survival: float,
    draft_limits: torch.Tensor,
    workspace: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    survival: torch.Tensor,
    lookups: torch.Tensor,
) -> None:
    """Draft the likeliest continuation of each request's context; the module's docstring has the method.

    *Slot* is a request's place in the runner's state, *row* its place in the batch. Nothing waits for the
    device, so lengths, slots and limits are taken as they are: they must be in range. The first call on a
    GPU for tensors of other sizes (K and num_reqs aside) compiles, for seconds; a worker makes it at start.

    Args:
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
        doubt: [1] float32, see there.
        memory_weights: [LONGEST_REMEMBERED + 1] float32, see there: of the runs.
        prior_ids, prior_probs: [prior_vocab_size, kp] int32 and float32, see `vllm_aasd.kernels.draft.Prior`;
            [0, 0] for none.
        runs: [S, 2 + 2kr] int32, S a power of two, see there; [0, 2] for none.
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
        lookups: [3] int64, added to: what was found in the store at the positions that voted, see
            `vllm_aasd.kernels.draft.cpu.draft`.

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
    if table.shape[0] % block_size:
        raise ValueError(f"table has {table.shape[0]} rows, expected whole blocks of {block_size}")
    _check_rows("block_tables", block_tables, max_num_reqs, torch.int32)
    if top_k and block_tables.shape[1] * block_size < all_token_ids.shape[1]:
        raise ValueError(
            f"block_tables has {block_tables.shape[1]} columns of {block_size} positions, "
            f"expected enough for the {all_token_ids.shape[1]} of all_token_ids"
        )
    if num_orders < 1:
        raise ValueError("theta has no entries, expected one per order")
    _check_vector("theta", theta, num_orders, torch.float32)
    _check_vector("alignment", alignment, num_orders, torch.float32)
    _check_vector("doubt", doubt, 1, torch.float32)
    if prior_ids.ndim != 2 or not prior_ids.is_contiguous() or not prior_probs.is_contiguous():
        raise ValueError(f"prior_ids has shape {tuple(prior_ids.shape)}, expected contiguous (vocab_size, k)")
    check_dtype("prior_ids", prior_ids, torch.int32)
    check_shape("prior_probs", prior_probs, tuple(prior_ids.shape))
    check_dtype("prior_probs", prior_probs, torch.float32)
    _check_vector("memory_weights", memory_weights, LONGEST_REMEMBERED + 1, torch.float32)
    if runs.ndim != 2 or runs.shape[1] % 2 or not runs.is_contiguous() or not _is_table(*runs.shape):
        raise ValueError(f"runs has shape {tuple(runs.shape)}, expected contiguous (a power of two, 2 + 2k), or (0, 2)")
    check_dtype("runs", runs, torch.int32)
    _check_vector("draft_limits", draft_limits, num_reqs, torch.int32)
    _check_rows("draft_token_ids", draft_token_ids, num_reqs, torch.int64)
    _check_vector("num_drafts", num_drafts, num_reqs, torch.int32)
    _check_rows("survival", survival, num_reqs, torch.float32)
    check_shape("survival", survival, tuple(draft_token_ids.shape))
    _check_vector("lookups", lookups, 3, torch.int64)
    words = _workspace_words(num_orders, max_matches, top_k, prior_ids.shape[1], _remembered(runs))
    _check_rows("workspace", workspace, workspace.shape[0], torch.int32)
    if workspace.shape[0] < num_reqs or workspace.shape[1] != words:
        shape = tuple(workspace.shape)
        raise ValueError(f"workspace has shape {shape}, expected (at least {num_reqs}, {words})")
    _implementation(all_token_ids.device.type).draft_batch(
        all_token_ids,
        total_len,
        idx_mapping,
        table,
        block_tables,
        block_size,
        theta,
        alignment,
        doubt,
        memory_weights,
        prior_ids,
        prior_probs,
        runs,
        vocab_size,
        max_matches,
        min_survival,
        draft_limits,
        workspace,
        draft_token_ids,
        num_drafts,
        survival,
        lookups,
    )


def _workspace_words(num_orders: int, max_matches: int, top_k: int, prior_top_k: int, remembered: int) -> int:
    # The lists of matches, then the votes, each a token id and the bits of a weight.
    num_votes = ORDERS_USED * max_matches * (1 + top_k) + prior_top_k
    num_votes += (LONGEST_REMEMBERED - SHORTEST_REMEMBERED + 1) * remembered
    return num_orders * max_matches + 2 * num_votes


def _remembered(runs: torch.Tensor) -> int:
    return (runs.shape[1] - 2) // 2


def _is_table(num_rows: int, words: int) -> bool:
    return num_rows & (num_rows - 1) == 0 if num_rows else words == 2


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


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.draft import triton

        return triton
    from vllm_aasd.kernels.draft import reference

    return reference
