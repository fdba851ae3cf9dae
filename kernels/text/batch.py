"""Known text of a batch of requests on a device: learned from, added to and looked up without waiting for it.

The index, its lookup and its reliability are those of `vllm_aasd.kernels.text`. Two ops keep them up to date, and
`vllm_aasd.kernels.draft.batch.draft_batch` drafts from them. In each step, `learn_and_append` first counts how right
the text was that the last drafts were made from, and then adds what was emitted to the documents of the requests:
first the pages of all rows, in the order of the rows, by one program; then the tokens and n-grams, by programs that
know nothing of each other. Heads of n-grams only grow, so the order in which these run doesn't matter: every
tensor-parallel rank gets the same index.

A request is known by its *slot*, its place in the runner's state, and by its *ticket*, a number that no other request
has: what is kept of the slot under another ticket is a former request's, and isn't used.

Launches, shapes and memory don't depend on data. A step reads and writes at most ``K + 1`` tokens of a request, or a
page of them, whatever is stored.
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_tensor
from vllm_aasd.kernels.text import (
    ANSWERS,
    CORPUS,
    MAX_CORPORA,
    NGRAM_SIZES,
    NUM_CELLS,
    PAGE_SIZE,
    PREDICTION,
    WAYS,
    TextIndex,
    index_bytes,
    new_index,
    new_reliability,
)

__all__ = [
    "ANSWERS_COLUMN",
    "KINDS",
    "MAX_PIECES",
    "NUM_SOURCES",
    "PREDICTION_COLUMN",
    "PREDICTION_OVERLAP",
    "TICKET",
    "TextTensors",
    "append_predictions",
    "learn_and_append",
    "new_texts",
    "text_bytes",
]

KINDS = (*[CORPUS] * MAX_CORPORA, ANSWERS, PREDICTION)
"""By column of `TextTensors.slots`, the kind of its source."""

NUM_SOURCES = len(KINDS)
ANSWERS_COLUMN, PREDICTION_COLUMN = map(KINDS.index, (ANSWERS, PREDICTION))

TICKET = NUM_SOURCES
"""The column of `TextTensors.slots` after the namespaces."""

PREDICTION_OVERLAP = NGRAM_SIZES[-1]
"""Tokens that come before each piece of a prediction, as far as it has them, so that n-grams go on across pieces."""

MAX_PIECES = 8
"""Of predictions, in one call of `append_predictions`."""

# Columns of `TextTensors.documents`, of `looked_up` and of `spans`.
OWNER, LENGTH, APPENDED, LAST_PAGE, DOCUMENT_COLUMNS = range(5)
LOOKED_FROM, NUM_LOOKED_UP, LOOKED_UP_COLUMNS = range(3)
SPAN_FIRST, SPAN_TOKENS, SPAN_LENGTH, SPAN_LAST_PAGE, SPAN_FIRST_BEGUN, SPAN_NAMESPACE, SPAN_COLUMNS = range(7)


class TextTensors(NamedTuple):
    """What is kept of known text, all on one device.

    Two indexes lie one after the other in the same tensors: the one that grows, of ``num_pages``, and that of the
    corpora.

    Attributes:
        tokens: ``[all_pages * PAGE_SIZE]`` int32, see `vllm_aasd.kernels.text.TextIndex`.
        pages: ``[all_pages, PAGE_COLUMNS]`` int64.
        heads: ``[len(NGRAM_SIZES), all_buckets, WAYS]`` int64.
        begun: ``[1]`` int64, pages ever begun of the index that grows.
        num_pages: of that index, or 0.
        found, right: ``[NUM_CELLS]`` int64, see `vllm_aasd.kernels.text.Reliability`.
        value: ``[NUM_CELLS]`` float32.
        prior: ``[NUM_CELLS, 2]`` float32, see `vllm_aasd.kernels.text.new_reliability`.
        slots: ``[max_num_reqs, NUM_SOURCES + 1]`` int64 by slot, written by the caller: the namespaces to look into, -1
            for none; that of `ANSWERS` is also written to. Then the ticket, > 0.
        documents, predictions: ``[max_num_reqs, DOCUMENT_COLUMNS]`` int64 by slot, of the answer and the prediction:
            the owner's ticket, the document's length, up to where the context is appended, and the last page.
        looked_up: ``[max_num_reqs, LOOKED_UP_COLUMNS]`` int32 by slot: the length of the context that was drafted from
            last, and at how many draft positions text was looked up.
        cells, found_tokens: ``[max_num_reqs, K, NUM_SOURCES]`` int32 by slot, see `vllm_aasd.kernels.text.KnownText`.
        spans: ``[at least max_num_reqs and MAX_PIECES, SPAN_COLUMNS]`` int64, scratch.
    """

    tokens: torch.Tensor
    pages: torch.Tensor
    heads: torch.Tensor
    begun: torch.Tensor
    num_pages: int
    found: torch.Tensor
    right: torch.Tensor
    value: torch.Tensor
    prior: torch.Tensor
    slots: torch.Tensor
    documents: torch.Tensor
    predictions: torch.Tensor
    looked_up: torch.Tensor
    cells: torch.Tensor
    found_tokens: torch.Tensor
    spans: torch.Tensor

    @property
    def has_text(self) -> bool:
        """Whether there is room for any."""
        return self.pages.shape[0] > 0

    @property
    def max_tokens(self) -> int:
        """Tokens of a request that a step appends at most; what is left is appended in the next ones."""
        return max(self.cells.shape[1] + 1, PAGE_SIZE)

    def write_corpora(self, corpora: TextIndex) -> None:
        """Draft from other corpora; their index has as many pages as that which was there."""
        num_buckets = self.num_pages * PAGE_SIZE // WAYS
        self.tokens[self.num_pages * PAGE_SIZE :].copy_(torch.from_numpy(corpora.tokens))
        self.pages[self.num_pages :].copy_(torch.from_numpy(corpora.pages))
        self.heads[:, num_buckets:].copy_(torch.from_numpy(corpora.heads))

    def clear(self) -> None:
        """Forget all text but the corpora's. Requests go on with what they add from now on."""
        num_buckets = self.num_pages * PAGE_SIZE // WAYS
        for tensor in (
            self.tokens[: self.num_pages * PAGE_SIZE],
            self.pages[: self.num_pages],
            self.heads[:, :num_buckets],
        ):
            tensor.fill_(-1)


def new_texts(
    max_num_reqs: int,
    max_draft_tokens: int,
    num_pages: int,
    corpora: TextIndex,
    prior: np.ndarray,
    device: torch.device | str,
) -> TextTensors:
    """Allocate what is kept for up to ``max_num_reqs`` requests.

    Args:
        max_num_reqs: slots.
        max_draft_tokens: K, the longest draft, >= 1.
        num_pages: of the index that grows; 0 for none.
        corpora: their index.
        prior: ``[NUM_CELLS, 2]`` float32, see `vllm_aasd.kernels.text.new_reliability`.
        device: that of the batches.
    """
    growing, reliability = new_index(num_pages), new_reliability(prior)

    def joined(one: np.ndarray, other: np.ndarray, axis: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([one, other], axis)).to(device)

    def of_slots(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((max_num_reqs, *shape), value, dtype=dtype, device=device)

    return TextTensors(
        tokens=joined(growing.tokens, corpora.tokens),
        pages=joined(growing.pages, corpora.pages),
        heads=joined(growing.heads, corpora.heads, axis=1),
        begun=torch.zeros(1, dtype=torch.int64, device=device),
        num_pages=num_pages,
        found=torch.from_numpy(reliability.found).to(device),
        right=torch.from_numpy(reliability.right).to(device),
        value=torch.from_numpy(reliability.value).to(device),
        prior=torch.from_numpy(prior).to(device),
        slots=of_slots(NUM_SOURCES + 1, value=-1),
        documents=of_slots(DOCUMENT_COLUMNS),
        predictions=of_slots(DOCUMENT_COLUMNS),
        looked_up=of_slots(LOOKED_UP_COLUMNS, dtype=torch.int32),
        cells=of_slots(max_draft_tokens, NUM_SOURCES, value=-1, dtype=torch.int32),
        found_tokens=of_slots(max_draft_tokens, NUM_SOURCES, dtype=torch.int32),
        spans=torch.zeros((max(max_num_reqs, MAX_PIECES), SPAN_COLUMNS), dtype=torch.int64, device=device),
    )


def text_bytes(max_num_reqs: int, max_draft_tokens: int, num_pages: int, num_corpus_pages: int) -> int:
    """The bytes that `new_texts` allocates."""
    per_slot = 8 * (NUM_SOURCES + 1 + 2 * DOCUMENT_COLUMNS) + 4 * LOOKED_UP_COLUMNS
    per_slot += 8 * max_draft_tokens * NUM_SOURCES
    spans = max(max_num_reqs, MAX_PIECES) * 8 * SPAN_COLUMNS
    return index_bytes(num_pages + num_corpus_pages) + max_num_reqs * per_slot + spans + 28 * NUM_CELLS + 8


def learn_and_append(
    texts: TextTensors,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_sampled: torch.Tensor,
    prompt_tail: int,
) -> None:
    """Learn from what was emitted in this step, and append it to the requests' documents, in place.

    Nothing waits for the device, so lengths and slots are taken as they are: they must be in range.

    Args:
        texts: what is kept.
        all_token_ids: ``[max_num_reqs, max_model_len]`` int32 by slot, rows contiguous, any row stride: the contexts.
        total_len: ``[max_num_reqs]`` int32 by slot, tokens in the context, those of this step included.
        idx_mapping: ``[num_reqs]`` int32 or int64, the slot of each row, no slot twice; negative for none.
        num_sampled: ``[num_reqs]`` int32, tokens emitted in this step; a row without any is left for later.
        prompt_tail: how many tokens of its prompt stand before an answer.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
    """
    max_num_reqs, num_reqs = texts.slots.shape[0], idx_mapping.shape[0]
    if all_token_ids.ndim != 2 or all_token_ids.shape[0] != max_num_reqs or all_token_ids.stride(1) != 1:
        shape = tuple(all_token_ids.shape)
        raise ValueError(f"all_token_ids has shape {shape}, expected {max_num_reqs} contiguous rows")
    check_dtype("all_token_ids", all_token_ids, torch.int32)
    check_tensor("total_len", total_len, (max_num_reqs,), torch.int32)
    check_tensor("idx_mapping", idx_mapping, (num_reqs,), torch.int32, torch.int64)
    check_tensor("num_sampled", num_sampled, (num_reqs,), torch.int32)
    if num_reqs > max_num_reqs:
        raise ValueError(f"idx_mapping has {num_reqs} rows, expected at most {max_num_reqs}")
    if texts.has_text and num_reqs:
        implementation = _implementation(all_token_ids.device.type)
        implementation.learn_and_append(texts, all_token_ids, total_len, idx_mapping, num_sampled, prompt_tail)


def append_predictions(texts: TextTensors, token_ids: torch.Tensor, pieces: torch.Tensor) -> None:
    """Append pieces of predictions to their documents, in place.

    Args:
        texts: what is kept.
        token_ids: ``[num_pieces, length]`` int32, rows contiguous. A piece stands after the `PREDICTION_OVERLAP` tokens
            that come before it in the prediction, or after all if there are fewer.
        pieces: ``[num_pieces, 3]`` int64, contiguous: the slot, no slot twice, -1 for no piece; where in the row the
            piece begins, and where it ends.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
    """
    if token_ids.ndim != 2 or not token_ids.is_contiguous() or not pieces.is_contiguous():
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}, expected contiguous (num_pieces, length)")
    check_dtype("token_ids", token_ids, torch.int32)
    check_tensor("pieces", pieces, (token_ids.shape[0], 3), torch.int64)
    if token_ids.shape[0] > MAX_PIECES:
        raise ValueError(f"pieces has {token_ids.shape[0]} rows, expected at most {MAX_PIECES}")
    if texts.num_pages:
        _implementation(token_ids.device.type).append_predictions(texts, token_ids, pieces)


def _implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.text import triton

        return triton
    from vllm_aasd.kernels.text import batch_reference

    return batch_reference
