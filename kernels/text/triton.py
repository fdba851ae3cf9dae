"""The Triton path of `vllm_aasd.kernels.text.batch`, which has the method.

`learn_and_begin_kernel` is one program for all rows: it counts in histograms, and numbers pages by prefix sums. At 256
rows of 8 drafts it runs four rounds of about 3 us. `write_kernel` has a program for each page that a row may write to,
of one token a lane.

State is loaded by all threads that hold a copy of it, and stored by one: a barrier stands between.
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels import text
from vllm_aasd.kernels.common.backends import gpu_kind
from vllm_aasd.kernels.text import batch
from vllm_aasd.kernels.text.batch import NUM_SOURCES, TextTensors
from vllm_aasd.kernels.text.index_triton import (
    PAGE_COLUMNS,
    PAGE_SIZE,
    SIZES,
    SLOT_COLUMNS,
    WAYS,
    bucket_of,
    hash_with,
    number_of,
    page_number,
    place_of,
    way_of,
)

_NUMBER, _NAMESPACE = tl.constexpr(text.NUMBER), tl.constexpr(text.NAMESPACE)
_PREVIOUS, _NEXT = tl.constexpr(text.PREVIOUS), tl.constexpr(text.NEXT)
_ANSWERS, _PREDICTION = tl.constexpr(batch.ANSWERS_COLUMN), tl.constexpr(batch.PREDICTION_COLUMN)
_NUM_CELLS, _MAX_COUNT = tl.constexpr(text.NUM_CELLS), tl.constexpr(text.MAX_COUNT)
_NUM_SOURCES, _TICKET = tl.constexpr(batch.NUM_SOURCES), tl.constexpr(batch.TICKET)
_OWNER, _LENGTH = tl.constexpr(batch.OWNER), tl.constexpr(batch.LENGTH)
_APPENDED, _LAST_PAGE = tl.constexpr(batch.APPENDED), tl.constexpr(batch.LAST_PAGE)
_DOCUMENT_COLUMNS = tl.constexpr(batch.DOCUMENT_COLUMNS)
_LOOKED_FROM, _NUM_LOOKED_UP = tl.constexpr(batch.LOOKED_FROM), tl.constexpr(batch.NUM_LOOKED_UP)
_LOOKED_UP_COLUMNS, _SPAN_COLUMNS = tl.constexpr(batch.LOOKED_UP_COLUMNS), tl.constexpr(batch.SPAN_COLUMNS)
_SPAN_FIRST, _SPAN_TOKENS = tl.constexpr(batch.SPAN_FIRST), tl.constexpr(batch.SPAN_TOKENS)
_SPAN_LENGTH, _SPAN_LAST_PAGE = tl.constexpr(batch.SPAN_LENGTH), tl.constexpr(batch.SPAN_LAST_PAGE)
_SPAN_FIRST_BEGUN = tl.constexpr(batch.SPAN_FIRST_BEGUN)
_SPAN_NAMESPACE = tl.constexpr(batch.SPAN_NAMESPACE)

LOOKUPS = 2048
"""Lookups of a round, eight a thread."""

HALVINGS = 16
"""Of a cell before more is added: enough for 2^24 outcomes in one step."""

BEGIN_OPTIONS = {
    "cuda": {"num_warps": 8, "enable_fp_fusion": False},
    "hip": {"num_warps": 4, "enable_fp_fusion": False},
}
"""By the kind of GPU: 256 threads either way. A product that is not fused with its sum is rounded, as in the
reference."""


@triton.jit
def _begin_pages(
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    num_pages,
    begun,
    documents_ptr,  # [max_num_reqs, _DOCUMENT_COLUMNS]
    slots,
    present,
    namespaces,
    num_tokens,
    length,
    last_page,
):
    """Begin the pages of some rows, in their order; note in their documents how far these go.

    Returns how many pages were ever begun now, and how many before
    each row's first.
    """
    num_before = (length + PAGE_SIZE - 1) // PAGE_SIZE
    num_new = tl.where(present, (length + num_tokens + PAGE_SIZE - 1) // PAGE_SIZE - num_before, 0)
    first_begun = begun + tl.cumsum(num_new, axis=0) - num_new
    begun += tl.sum(num_new, axis=0)
    for at in range(tl.max(num_new, axis=0)):
        number = number_of(first_begun + at, num_pages)
        # A later one of these takes its place else.
        stays = (at < num_new) & (first_begun + at >= begun - num_pages)
        page_ptr = pages_ptr + place_of(number).to(tl.int64) * PAGE_COLUMNS
        tl.store(page_ptr + _NUMBER, number, mask=stays)
        tl.store(page_ptr + _NAMESPACE, namespaces, mask=stays)
        previous = number_of(first_begun + at - 1, num_pages)
        following = number_of(first_begun + at + 1, num_pages)
        tl.store(page_ptr + _PREVIOUS, tl.where(at == 0, last_page, previous), mask=stays)
        tl.store(page_ptr + _NEXT, tl.where(at + 1 < num_new, following, -1), mask=stays)
    tl.debug_barrier()
    goes_on = (num_new > 0) & (last_page >= 0)
    is_held = goes_on & (page_number(pages_ptr, last_page, 0, goes_on) == last_page)
    number = number_of(first_begun, num_pages)
    tl.store(pages_ptr + place_of(last_page).to(tl.int64) * PAGE_COLUMNS + _NEXT, number, mask=is_held)
    document_ptr = documents_ptr + slots * _DOCUMENT_COLUMNS
    tl.store(document_ptr + _LENGTH, length + num_tokens, mask=present)
    newest = number_of(first_begun + num_new - 1, num_pages)
    tl.store(document_ptr + _LAST_PAGE, tl.where(num_new > 0, newest, last_page), mask=present)
    return begun, first_begun


@triton.jit
def _store_spans(spans_ptr, rows, is_row, first, num_tokens, length, last_page, first_begun, namespaces):
    """Tell `write_kernel` what to write."""
    span_ptr = spans_ptr + rows * _SPAN_COLUMNS
    tl.store(span_ptr + _SPAN_FIRST, first, mask=is_row)
    tl.store(span_ptr + _SPAN_TOKENS, num_tokens, mask=is_row)
    tl.store(span_ptr + _SPAN_LENGTH, length, mask=is_row)
    tl.store(span_ptr + _SPAN_LAST_PAGE, last_page, mask=is_row)
    tl.store(span_ptr + _SPAN_FIRST_BEGUN, first_begun, mask=is_row)
    tl.store(span_ptr + _SPAN_NAMESPACE, namespaces, mask=is_row)


# What may change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_rows", "num_pages"],
    do_not_specialize_on_alignment=["idx_mapping_ptr", "num_sampled_ptr"],
)
def learn_and_begin_kernel(
    all_token_ids_ptr,  # [max_num_reqs, max_model_len]
    all_token_ids_stride,
    total_len_ptr,  # [max_num_reqs]
    idx_mapping_ptr,  # [num_rows]
    num_sampled_ptr,  # [num_rows]
    num_rows,
    slots_ptr,  # [max_num_reqs, SLOT_COLUMNS]
    documents_ptr,  # [max_num_reqs, _DOCUMENT_COLUMNS]
    looked_up_ptr,  # [max_num_reqs, _LOOKED_UP_COLUMNS]
    cells_ptr,  # [max_num_reqs, max_draft_tokens, _NUM_SOURCES]
    found_tokens_ptr,  # [max_num_reqs, max_draft_tokens, _NUM_SOURCES]
    max_draft_tokens,
    found_ptr,  # [_NUM_CELLS]
    right_ptr,  # [_NUM_CELLS]
    value_ptr,  # [_NUM_CELLS]
    prior_ptr,  # [_NUM_CELLS, 2]
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    num_pages,
    begun_ptr,  # [1]
    spans_ptr,  # [num_rows, _SPAN_COLUMNS]
    prompt_tail,
    max_tokens,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Learn from all rows and begin their pages; see `vllm_aasd.kernels.text.batch.learn_and_append`."""
    SOURCES_PAD: tl.constexpr = triton.next_power_of_2(_NUM_SOURCES)
    begun = tl.load(begun_ptr)
    num_found = tl.zeros([BINS], tl.int32)
    num_right = tl.zeros([BINS], tl.int32)
    columns = tl.arange(0, COLUMNS)[None, :]
    step, source = columns // SOURCES_PAD, columns % SOURCES_PAD
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_row = rows < num_rows
        slots = tl.load(idx_mapping_ptr + rows, mask=is_row, other=-1).to(tl.int64)
        present = (slots >= 0) & (tl.load(num_sampled_ptr + rows, mask=is_row, other=0) > 0)
        end = tl.load(total_len_ptr + slots, mask=present, other=0).to(tl.int64)
        tickets = tl.load(slots_ptr + slots * SLOT_COLUMNS + _TICKET, mask=present, other=-1)
        namespaces = tl.load(slots_ptr + slots * SLOT_COLUMNS + _ANSWERS, mask=present, other=-1)
        document_ptr = documents_ptr + slots * _DOCUMENT_COLUMNS
        is_same = present & (tl.load(document_ptr + _OWNER, mask=present, other=-1) == tickets)
        length = tl.load(document_ptr + _LENGTH, mask=is_same, other=0)
        last_page = tl.load(document_ptr + _LAST_PAGE, mask=is_same, other=-1)
        appended = tl.load(document_ptr + _APPENDED, mask=is_same, other=0)
        first = tl.where(is_same, appended, tl.maximum(end - 1 - prompt_tail, 0))
        looked_up_ptrs = looked_up_ptr + slots * _LOOKED_UP_COLUMNS
        looked_from = tl.load(looked_up_ptrs + _LOOKED_FROM, mask=is_same, other=0).to(tl.int64)
        num_steps = tl.load(looked_up_ptrs + _NUM_LOOKED_UP, mask=is_same, other=0).to(tl.int64)
        num_steps = tl.minimum(num_steps, end - looked_from)

        is_known = (step < num_steps[:, None]) & (source < _NUM_SOURCES)
        entries = (slots[:, None] * max_draft_tokens + step) * _NUM_SOURCES + source
        cells = tl.load(cells_ptr + entries, mask=is_known, other=-1)
        is_known &= cells >= 0
        truth_ptrs = all_token_ids_ptr + slots[:, None] * all_token_ids_stride + looked_from[:, None] + step
        truths = tl.load(truth_ptrs, mask=is_known, other=-1)
        is_right = is_known & (tl.load(found_tokens_ptr + entries, mask=is_known, other=-2) == truths)
        bins = tl.reshape(cells, [ROWS * COLUMNS])
        num_found += tl.histogram(bins, BINS, mask=tl.reshape(is_known, [ROWS * COLUMNS]))
        num_right += tl.histogram(bins, BINS, mask=tl.reshape(is_right, [ROWS * COLUMNS]))

        grows = present & (namespaces != -1) & (num_pages > 0)
        last = tl.minimum(end, first + max_tokens)
        num_tokens = tl.where(grows, last - first, 0)
        tl.debug_barrier()
        tl.store(looked_up_ptrs + _NUM_LOOKED_UP, 0, mask=present)
        tl.store(document_ptr + _OWNER, tickets, mask=present)
        tl.store(document_ptr + _APPENDED, tl.where(grows, last, first), mask=present)
        begun, first_begun = _begin_pages(
            pages_ptr,
            num_pages,
            begun,
            documents_ptr,
            slots,
            present,
            namespaces,
            num_tokens,
            length,
            last_page,
        )
        _store_spans(spans_ptr, rows, is_row, first, num_tokens, length, last_page, first_begun, namespaces)
        tl.debug_barrier()
    tl.debug_barrier()
    tl.store(begun_ptr, begun)

    cells = tl.arange(0, BINS)
    is_counted = (num_found > 0) & (cells < _NUM_CELLS)
    found = tl.load(found_ptr + cells, mask=is_counted, other=0)
    right = tl.load(right_ptr + cells, mask=is_counted, other=0)
    for _ in tl.static_range(HALVINGS):
        is_full = found >= _MAX_COUNT
        found = tl.where(is_full, found >> 1, found)
        right = tl.where(is_full, right >> 1, right)
    found += num_found
    right += num_right
    expected = tl.load(prior_ptr + 2 * cells, mask=is_counted, other=0.0)
    weight = tl.load(prior_ptr + 2 * cells + 1, mask=is_counted, other=1.0)
    # The reference's types, and so its rounding.
    sure = right.to(tl.float64) + (expected * weight).to(tl.float64)
    value = sure / (found.to(tl.float64) + weight.to(tl.float64))
    tl.debug_barrier()
    tl.store(found_ptr + cells, found, mask=is_counted)
    tl.store(right_ptr + cells, right, mask=is_counted)
    tl.store(value_ptr + cells, value.to(tl.float32), mask=is_counted)


@triton.jit(do_not_specialize=["num_pages"])
def begin_predictions_kernel(
    pieces_ptr,  # [num_rows, 3]
    num_rows,
    slots_ptr,  # [max_num_reqs, SLOT_COLUMNS]
    documents_ptr,  # [max_num_reqs, _DOCUMENT_COLUMNS]
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    num_pages,
    begun_ptr,  # [1]
    spans_ptr,  # [num_rows, _SPAN_COLUMNS]
    ROWS: tl.constexpr,
):
    """Begin the pages of pieces of predictions; see `vllm_aasd.kernels.text.batch.append_predictions`."""
    begun = tl.load(begun_ptr)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    slots = tl.load(pieces_ptr + 3 * rows, mask=is_row, other=-1)
    present = slots >= 0
    first = tl.load(pieces_ptr + 3 * rows + 1, mask=present, other=0)
    last = tl.load(pieces_ptr + 3 * rows + 2, mask=present, other=0)
    tickets = tl.load(slots_ptr + slots * SLOT_COLUMNS + _TICKET, mask=present, other=-1)
    namespaces = tl.load(slots_ptr + slots * SLOT_COLUMNS + _PREDICTION, mask=present, other=-1)
    present &= namespaces != -1
    document_ptr = documents_ptr + slots * _DOCUMENT_COLUMNS
    is_same = present & (tl.load(document_ptr + _OWNER, mask=present, other=-1) == tickets)
    length = tl.load(document_ptr + _LENGTH, mask=is_same, other=0)
    last_page = tl.load(document_ptr + _LAST_PAGE, mask=is_same, other=-1)
    num_tokens = tl.where(present, last - first, 0)
    tl.debug_barrier()
    tl.store(document_ptr + _OWNER, tickets, mask=present)
    begun, first_begun = _begin_pages(
        pages_ptr,
        num_pages,
        begun,
        documents_ptr,
        slots,
        present,
        namespaces,
        num_tokens,
        length,
        last_page,
    )
    _store_spans(spans_ptr, rows, is_row, first, num_tokens, length, last_page, first_begun, namespaces)
    tl.store(begun_ptr, begun)


@triton.jit(
    do_not_specialize=["all_buckets", "num_pages"],
    do_not_specialize_on_alignment=["idx_mapping_ptr"],
)
def write_kernel(
    token_ids_ptr,  # [rows or slots, length]
    token_ids_stride,
    idx_mapping_ptr,  # [num_rows]; of no use if the rows of token_ids are the batch's
    spans_ptr,  # [num_rows, _SPAN_COLUMNS]
    tokens_ptr,  # [all_pages * PAGE_SIZE]
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    heads_ptr,  # [SIZES, all_buckets, WAYS]
    all_buckets,
    num_pages,
    BY_SLOT: tl.constexpr,
):
    """Write a row's tokens to one page of its document, and enter n-grams; see `vllm_aasd.kernels.text.batch`."""
    row = tl.program_id(0).to(tl.int64)
    span_ptr = spans_ptr + row * _SPAN_COLUMNS
    num_tokens = tl.load(span_ptr + _SPAN_TOKENS)
    length = tl.load(span_ptr + _SPAN_LENGTH)
    # In tokens of the document: where the page begins.
    start = (length // PAGE_SIZE + tl.program_id(1)) * PAGE_SIZE
    if (num_tokens > 0) & (start < length + num_tokens):
        first = tl.load(span_ptr + _SPAN_FIRST)
        last_page = tl.load(span_ptr + _SPAN_LAST_PAGE)
        first_begun = tl.load(span_ptr + _SPAN_FIRST_BEGUN)
        namespace = tl.load(span_ptr + _SPAN_NAMESPACE)
        num_before = (length + PAGE_SIZE - 1) // PAGE_SIZE
        rank = start // PAGE_SIZE - num_before
        number = tl.where(rank < 0, last_page, number_of(first_begun + rank, num_pages))
        before = tl.where(rank <= 0, last_page, number_of(first_begun + rank - 1, num_pages))
        is_held = (number >= 0) & (page_number(pages_ptr, number, 0, number >= 0) == number)
        goes_on = (before >= 0) & (page_number(pages_ptr, before, 0, before >= 0) == before)
        offset = tl.arange(0, PAGE_SIZE).to(tl.int64)
        at = start + offset
        end = tl.where(is_held, length + num_tokens, start)
        is_new = (at >= length) & (at < end)
        source = row
        if BY_SLOT:
            source = tl.load(idx_mapping_ptr + row).to(tl.int64)
        text_ptr = token_ids_ptr + (source * token_ids_stride + first - length)
        token = tl.load(text_ptr + at, mask=is_new, other=-1)
        place = place_of(number).to(tl.int64) * PAGE_SIZE + offset
        # The rest of a page that was begun is cleared.
        whole = tl.where(is_held & (rank >= 0), start + PAGE_SIZE, end)
        tl.store(tokens_ptr + place, token, mask=(at >= length) & (at < whole))

        follows = is_new & (at > tl.where(goes_on, 0, start))
        position = tl.where(offset > 0, number * PAGE_SIZE + offset - 1, before * PAGE_SIZE + PAGE_SIZE - 1)
        way = way_of(token)
        hashed = tl.zeros_like(at).to(tl.uint64) + namespace.to(tl.uint64)
        for size_rank in tl.static_range(SIZES):
            for back in tl.static_range((1 << size_rank) * (size_rank > 0), 2 << size_rank):
                hashed = hash_with(hashed, tl.load(text_ptr + (at - 1 - back), mask=follows & (back < at), other=0))
            bucket = bucket_of(hashed, num_pages.to(tl.int64) * (PAGE_SIZE // WAYS))
            head_ptrs = heads_ptr + (size_rank * all_buckets.to(tl.int64) + bucket) * WAYS + way
            tl.atomic_max(head_ptrs, position, mask=follows & ((2 << size_rank) <= at), sem="relaxed")


def learn_and_append(
    texts: TextTensors,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_sampled: torch.Tensor,
    prompt_tail: int,
) -> None:
    """See `vllm_aasd.kernels.text.batch.learn_and_append`."""
    num_rows, max_draft_tokens = len(idx_mapping), texts.cells.shape[1]
    columns = triton.next_power_of_2(max_draft_tokens) * triton.next_power_of_2(NUM_SOURCES)
    learn_and_begin_kernel[(1,)](
        all_token_ids,
        all_token_ids.stride(0),
        total_len,
        idx_mapping,
        num_sampled,
        num_rows,
        texts.slots,
        texts.documents,
        texts.looked_up,
        texts.cells,
        texts.found_tokens,
        max_draft_tokens,
        texts.found,
        texts.right,
        texts.value,
        texts.prior,
        texts.pages,
        texts.num_pages,
        texts.begun,
        texts.spans,
        prompt_tail,
        texts.max_tokens,
        ROWS=max(LOOKUPS // columns, 8),
        COLUMNS=columns,
        BINS=triton.next_power_of_2(text.NUM_CELLS),
        HALVINGS=HALVINGS,
        **BEGIN_OPTIONS[gpu_kind()],
    )
    _write(texts, all_token_ids, idx_mapping, num_rows, texts.max_tokens, by_slot=True)


def append_predictions(texts: TextTensors, token_ids: torch.Tensor, pieces: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.text.batch.append_predictions`."""
    num_rows, length = token_ids.shape
    begin_predictions_kernel[(1,)](
        pieces,
        num_rows,
        texts.slots,
        texts.predictions,
        texts.pages,
        texts.num_pages,
        texts.begun,
        texts.spans,
        ROWS=triton.next_power_of_2(num_rows),
        num_warps=1,
    )
    _write(texts, token_ids, pieces, num_rows, length, by_slot=False)


def _write(
    texts: TextTensors,
    token_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_rows: int,
    max_tokens: int,
    by_slot: bool,
) -> None:
    if texts.num_pages:
        write_kernel[(num_rows, triton.cdiv(max_tokens, text.PAGE_SIZE) + 1)](
            token_ids,
            token_ids.stride(0),
            idx_mapping,
            texts.spans,
            texts.tokens,
            texts.pages,
            texts.heads,
            texts.heads.shape[1],
            texts.num_pages,
            BY_SLOT=by_slot,
            num_warps=1,
        )
