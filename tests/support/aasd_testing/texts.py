"""Known text of the device, made for tests."""

import torch

from vllm_aasd.drafting.known_text import prior_reliability
from vllm_aasd.kernels.text import TextIndex, new_index
from vllm_aasd.kernels.text.batch import TextTensors, new_texts

__all__ = ["TextTensors", "copy_texts", "no_texts", "texts_of"]


def texts_of(max_num_reqs: int, max_draft_tokens: int, num_pages: int, corpora: TextIndex | None = None) -> TextTensors:
    """Text of this many pages, and corpora; nothing is known of any slot."""
    corpora = new_index(0) if corpora is None else corpora
    return new_texts(max_num_reqs, max_draft_tokens, num_pages, corpora, prior_reliability(), "cpu")


def no_texts(max_num_reqs: int, max_draft_tokens: int) -> TextTensors:
    """No room for any."""
    return texts_of(max_num_reqs, max_draft_tokens, 0)


def copy_texts(into: TextTensors, source: TextTensors) -> None:
    """Copy all that an op may have written."""
    for one, other in zip(into, source, strict=True):
        if isinstance(one, torch.Tensor):
            one.copy_(other)
