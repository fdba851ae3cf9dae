"""vLLM's own n-gram proposer, outside an engine: what aasd's drafter is held against."""

import types
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.methods import METHODS
from vllm_aasd.drafting.drafter import AlignmentView


def proposer(max_tokens: int) -> Any:
    """vLLM's proposer for one request at a time, at its best settings (those of `METHODS`).

    Args:
        max_tokens: of a context.
    """
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    # What the proposer reads of vLLM's configuration.
    return NgramProposer(
        types.SimpleNamespace(
            speculative_config=types.SimpleNamespace(**METHODS["ngram"]),
            model_config=types.SimpleNamespace(max_model_len=max_tokens + 1),
            scheduler_config=types.SimpleNamespace(max_num_seqs=1),
            parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        )
    )


class NgramDrafter:
    """It, as `benchmarks.replay` asks a drafter; it knows of no survival, so each token has 1.

    Args:
        max_tokens: of a context.
    """

    num_draft_tokens: int = METHODS["ngram"]["num_speculative_tokens"]

    def __init__(self, max_tokens: int) -> None:
        self._proposer = proposer(max_tokens)
        self._batch = np.zeros((1, max_tokens + 1), np.int32)

    def draft(
        self, request_id: str, token_ids: np.ndarray, alignment: AlignmentView, max_draft_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Drafter.draft`."""
        length = len(token_ids)
        self._batch[0, :length] = token_ids
        (found,) = self._proposer.propose(self.num_draft_tokens, [[0]], np.array([length], np.int32), self._batch)
        draft = np.array(found[: max(max_draft_tokens, 0)], np.int32)
        return draft, np.ones(len(draft), np.float32)

    def verified(self, request_id: str, num_draft_tokens: int, num_accepted: int) -> None:
        """It doesn't learn."""

    def forget(self, request_ids: Iterable[str]) -> None:
        """It holds nothing."""
