"""Plain reference of `vllm_aasd.kernels.text.batch`: the specification. It reads and writes CPU tensors."""

import numpy as np

from vllm_aasd.kernels.text import CORPUS, PAGE_SIZE, WAYS, KnownText, Reliability, TextIndex
from vllm_aasd.kernels.text.batch import (
    ANSWERS_COLUMN,
    APPENDED,
    KINDS,
    LAST_PAGE,
    LENGTH,
    LOOKED_FROM,
    NUM_LOOKED_UP,
    NUM_SOURCES,
    OWNER,
    PREDICTION_COLUMN,
    TICKET,
)
from vllm_aasd.kernels.text.reference import begin_pages, last_page_of, learn, write


def learn_and_append(texts, all_token_ids, total_len, idx_mapping, num_sampled, prompt_tail):
    """See `vllm_aasd.kernels.text.batch.learn_and_append`."""
    slots, documents, looked_up = texts.slots.numpy(), texts.documents.numpy(), texts.looked_up.numpy()
    contexts = [all_token_ids[slot, : int(total_len[slot])].numpy() for slot in range(len(slots))]
    rows = [slot for slot, num in zip(idx_mapping.tolist(), num_sampled.tolist(), strict=True) if slot >= 0 and num > 0]
    observed = []
    for slot in rows:
        start, num_steps = looked_up[slot].tolist()
        looked_up[slot, NUM_LOOKED_UP] = 0
        if documents[slot, OWNER] == slots[slot, TICKET]:
            for step, truth in enumerate(contexts[slot][start : start + num_steps].tolist()):
                observed.append((texts.cells[slot, step].tolist(), texts.found_tokens[slot, step].tolist(), truth))
    cells, tokens, true_token_ids = zip(*observed, strict=True) if observed else ([], [], [])
    reliability = Reliability(texts.found.numpy(), texts.right.numpy(), texts.value.numpy())
    learn(reliability, texts.prior.numpy(), cells, tokens, true_token_ids)

    spans = []
    for slot in rows:
        if documents[slot, OWNER] != slots[slot, TICKET]:
            first = max(len(contexts[slot]) - 1 - prompt_tail, 0)
            documents[slot] = slots[slot, TICKET], 0, first, -1
        if texts.num_pages and slots[slot, ANSWERS_COLUMN] != -1:
            first = int(documents[slot, APPENDED])
            last = min(len(contexts[slot]), first + texts.max_tokens)
            documents[slot, APPENDED] = last
            spans.append((documents[slot], slots[slot, ANSWERS_COLUMN], contexts[slot], first, last))
    _append(texts, spans)


def append_predictions(texts, token_ids, pieces):
    """See `vllm_aasd.kernels.text.batch.append_predictions`."""
    slots, documents = texts.slots.numpy(), texts.predictions.numpy()
    spans = []
    for row, (slot, first, last) in zip(token_ids.numpy(), pieces.tolist(), strict=True):
        if slot < 0 or slots[slot, PREDICTION_COLUMN] == -1:
            continue
        if documents[slot, OWNER] != slots[slot, TICKET]:
            documents[slot] = slots[slot, TICKET], 0, 0, -1
        spans.append((documents[slot], slots[slot, PREDICTION_COLUMN], row, first, last))
    _append(texts, spans)


def _append(texts, spans):
    """Append to documents: the pages of all of them come first."""
    index = indexes_of(texts)[0]
    begun = []
    for document, namespace, _, first, last in spans:
        begun.append(begin_pages(index, namespace, int(document[LAST_PAGE]), int(document[LENGTH]), last - first))
    for (document, namespace, token_ids, first, last), first_begun in zip(spans, begun, strict=True):
        length, last_page = int(document[LENGTH]), int(document[LAST_PAGE])
        write(index, namespace, last_page, first_begun, length, token_ids, first, last)
        document[LENGTH] = length + last - first
        document[LAST_PAGE] = last_page_of(index, last_page, first_begun, length, length + last - first)


def indexes_of(texts):
    """The index that grows and that of the corpora, which share memory with the tensors."""
    num_pages, num_buckets = texts.num_pages, texts.num_pages * PAGE_SIZE // WAYS
    tokens, pages, heads = texts.tokens.numpy(), texts.pages.numpy(), texts.heads.numpy()
    return (
        TextIndex(tokens[: num_pages * PAGE_SIZE], pages[:num_pages], heads[:, :num_buckets], texts.begun.numpy()),
        TextIndex(tokens[num_pages * PAGE_SIZE :], pages[num_pages:], heads[:, num_buckets:], np.zeros(1, np.int64)),
    )


def known_of(texts, slot, num_steps):
    """What the request in a slot may draft from; nothing for a negative slot."""
    namespaces = texts.slots[slot].tolist() if slot >= 0 else [-1] * NUM_SOURCES
    sources = [
        (int(kind == CORPUS), namespaces[column], kind) for column, kind in enumerate(KINDS) if namespaces[column] != -1
    ]
    shape = num_steps, len(sources)
    return KnownText(
        indexes_of(texts),
        np.array(sources, np.int64).reshape(-1, 3),
        texts.value.numpy(),
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(num_steps, np.bool_),
    )


def note_lookups(texts, slot, known, length, num_looked_up):
    """Keep what was looked up for a draft until it is known what was emitted."""
    texts.looked_up[slot, LOOKED_FROM] = length
    texts.looked_up[slot, NUM_LOOKED_UP] = num_looked_up
    texts.cells[slot, :num_looked_up] = -1
    asked = [column for column in range(NUM_SOURCES) if texts.slots[slot, column] != -1]
    for source, column in enumerate(asked):
        for step in range(num_looked_up):
            texts.cells[slot, step, column] = int(known.cells[step, source])
            if known.cells[step, source] >= 0:
                texts.found_tokens[slot, step, column] = int(known.tokens[step, source])
