"""Known text on the V2 model runner: which request may draft from what, and what is kept on the device."""

from collections.abc import Iterable

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool

from vllm_aasd.drafting.corpora import Corpora
from vllm_aasd.drafting.known_text import PROMPT_TAIL, prior_reliability
from vllm_aasd.kernels.text import num_pages_for
from vllm_aasd.kernels.text.batch import (
    ANSWERS_COLUMN,
    MAX_PIECES,
    NUM_SOURCES,
    PREDICTION_COLUMN,
    PREDICTION_OVERLAP,
    TICKET,
    TextTensors,
    append_predictions,
    learn_and_append,
    new_texts,
    text_bytes,
)

_PIECE = 1024
"""Tokens of a prediction that a step appends, overlap included: it bounds the step's work, and is well ahead of what
the request emits."""


class V2Texts:
    """The text that requests share, by request slot.

    What the host says of a request, and a prediction's text, is copied before the step's forward pass into memory of
    the device, in the order of its work: the host may be ahead of a step that still appends, and what it writes then
    for a slot's next owner must not be taken for the last one's.

    Args:
        num_bytes: of the index of earlier answers and predictions, at most; 0 for none.
        shares_text: whether our scheduler says which requests share text.
        max_num_reqs: slots.
        max_draft_tokens: the longest draft.
        device: that of the batches.
    """

    def __init__(
        self, num_bytes: int, shares_text: bool, max_num_reqs: int, max_draft_tokens: int, device: torch.device
    ) -> None:
        self._num_pages = num_pages_for(num_bytes)
        self._shares_text = shares_text
        self._sizes = max_num_reqs, max_draft_tokens
        self._device = device
        self._corpora = Corpora()
        self._texts: TextTensors | None = None
        self._slots = np.full((max_num_reqs, NUM_SOURCES + 1), -1, np.int64)
        self._slots_pool = UvaBufferPool(self._slots.shape, torch.int64)
        self._changed = True
        self._num_tickets = 0
        # By slot, in the order of their arrival: a prediction, and how much of it is appended.
        self._predictions: dict[int, tuple[np.ndarray, int]] = {}
        shapes = ((MAX_PIECES, _PIECE), torch.int32), ((MAX_PIECES, 3), torch.int64)
        self._pieces_pools = [UvaBufferPool(shape, dtype) for shape, dtype in shapes]
        self._pieces = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]

    def learn_corpora(self, corpora: Corpora) -> None:
        """Take what does not come from requests, before `nbytes` is asked for."""
        self._corpora = corpora

    def write_corpora(self) -> None:
        """Let the device see corpora that have changed, after the steps that are under way."""
        if self._texts is not None:
            self._texts.write_corpora(self._corpora.index)

    @property
    def nbytes(self) -> int:
        """Bytes that `bind` allocates on the device."""
        return text_bytes(*self._sizes, self._num_pages, len(self._corpora.index.pages))

    def bind(self) -> TextTensors:
        """Allocate, and compile what appends predictions, so that no request waits for it."""
        texts = new_texts(*self._sizes, self._num_pages, self._corpora.index, prior_reliability(), self._device)
        self._pieces[1].fill_(-1)
        append_predictions(texts, *self._pieces)
        self._texts = texts
        self._changed = True
        return texts

    def enter(self, slot: int) -> None:
        """Another request enters a slot, with nothing to draft from so far."""
        self._num_tickets += 1
        self._slots[slot] = -1
        self._slots[slot, TICKET] = self._num_tickets
        self._predictions.pop(slot, None)
        self._changed = True

    def admit(
        self, slot: int, namespace: int | None, prediction: np.ndarray | None, corpora: Iterable[str] = ()
    ) -> None:
        """Say what the request that has entered a slot may draft from.

        Args:
            slot: its slot.
            namespace: of the earlier answers that it shares, >= 0; None if it neither reads nor writes any.
            prediction: ``[n]`` int32, what its client expects.
            corpora: the names of those that it draws from.
        """
        row = self._slots[slot]
        for column, of_one in enumerate(self._corpora.namespaces(corpora)):
            row[column] = of_one
        if not self._num_pages:
            return
        if namespace is not None and self._shares_text:
            row[ANSWERS_COLUMN] = namespace
        if prediction is not None and len(prediction):
            # No other request is given a negative namespace; -1 is for none.
            row[PREDICTION_COLUMN] = -1 - row[TICKET]
            self._predictions[slot] = prediction, 0

    def apply_staged_writes(self) -> None:
        """Let the device see what was taken in since the last step."""
        if self._texts is None:
            return
        if self._changed:
            self._slots_pool.copy_to_gpu(self._slots, out=self._texts.slots)
            self._changed = False
        if self._predictions:
            for pool, host, device in zip(self._pieces_pools, self._next_pieces(), self._pieces, strict=True):
                pool.copy_to_gpu(host, out=device)
            append_predictions(self._texts, *self._pieces)

    def _next_pieces(self) -> tuple[np.ndarray, np.ndarray]:
        token_ids, pieces = np.zeros((MAX_PIECES, _PIECE), np.int32), np.full((MAX_PIECES, 3), -1, np.int64)
        for row, slot in enumerate([*self._predictions][:MAX_PIECES]):
            prediction, begin = self._predictions.pop(slot)
            overlap = min(begin, PREDICTION_OVERLAP)
            text = prediction[begin - overlap :][:_PIECE]
            token_ids[row, : len(text)] = text
            pieces[row] = slot, overlap, len(text)
            end = begin - overlap + len(text)
            if end < len(prediction):
                # Behind the others.
                self._predictions[slot] = prediction, end
        return token_ids, pieces

    def step(
        self,
        all_token_ids: torch.Tensor,
        total_len: torch.Tensor,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
    ) -> None:
        """Learn from what was emitted in a step, and add it to what is known; see `learn_and_append`."""
        if self._texts is not None:
            learn_and_append(self._texts, all_token_ids, total_len, idx_mapping, num_sampled, PROMPT_TAIL)

    def clear(self) -> None:
        """Forget all text. Requests go on with what they add from now on."""
        self._predictions.clear()
        if self._texts is not None:
            self._texts.clear()
