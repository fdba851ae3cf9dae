"""Placeholder tokens, which stand in a prompt for the embeddings of an image or a sound and must not be drafted.

A context is looked up by its last tokens, and a target emits no placeholders. So as long as none is drafted, the
positions of an image are never looked up, and predictions stored there have no effect. The text before an image may
still predict a placeholder, and a draft ends before it.
"""

from collections.abc import Iterable

import torch
from vllm.v1.core.sched.output import NewRequestData

from vllm_aasd.kernels.draft.batch import MAX_EXCLUDED


class PlaceholderTokens:
    """The placeholder ids seen so far. They are the model's, so there are few, and none is ever dropped.

    Args:
        device: where drafts are.

    Attributes:
        on_device: ``[MAX_EXCLUDED]`` int32, the ids, padded with -1.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._ids: set[int] = set()
        self.on_device = torch.full((MAX_EXCLUDED,), -1, dtype=torch.int32, device=device)

    def learn(self, requests: Iterable[NewRequestData]) -> None:
        """Note the tokens that stand for embeddings in new requests."""
        seen = set()
        for request in requests:
            prompt = request.prompt_token_ids
            for feature in request.mm_features if prompt is not None else ():
                for first, last in feature.mm_position.extract_embeds_range():
                    seen.update(prompt[first : last + 1])
        if seen <= self._ids or len(self._ids | seen) > MAX_EXCLUDED:
            # These embeddings replace ordinary text, without a placeholder, so any token may be drafted.
            return
        self._ids |= seen
        ids = torch.tensor(sorted(self._ids), dtype=torch.int32)
        self.on_device[: len(ids)].copy_(ids, non_blocking=True)

    def before_first(self, draft_token_ids: list[int]) -> list[int]:
        """The draft up to its first placeholder."""
        if not self._ids:
            return draft_token_ids
        first = next((place for place, token in enumerate(draft_token_ids) if token in self._ids), None)
        return draft_token_ids[:first]
