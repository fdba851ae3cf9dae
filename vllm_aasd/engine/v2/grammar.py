"""The scheduler's drafts on the V2 model runner, whose own stay on the device: they are written over those.

Only with synchronous scheduling: otherwise a step begins before the scheduler knows where the grammar stands.
"""

from collections.abc import Mapping

import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_aasd.kernels.count import UNPROMISED


class V2GrammarDrafts:
    """Puts the drafts that our scheduler has made where vLLM's runner and our verifier look for them.

    Args:
        req_states: the runner's.
        num_drafts: ``[max_num_reqs]`` int32, by slot, written in place.
        survival: ``[max_num_reqs, width]`` float32, by slot, written in place: what was promised.
    """

    def __init__(self, req_states: RequestState, num_drafts: torch.Tensor, survival: torch.Tensor) -> None:
        self._req_states = req_states
        self._num_drafts = num_drafts
        self._survival = survival
        self._told: dict[str, list[int]] = {}

    def told(self, req_ids: list[str], draft_token_ids: list[list[int]]) -> None:
        """Note which drafts the scheduler was told of."""
        self._told = dict(zip(req_ids, draft_token_ids, strict=True))

    def write(self, scheduled: Mapping[str, list[int]]) -> None:
        """Write the drafts of a step that are others than it was told of.

        Args:
            scheduled: by request.
        """
        for req_id, token_ids in scheduled.items():
            slot = self._req_states.req_id_to_index.get(req_id)
            if slot is None or min(token_ids) < 0 or self._told.get(req_id, [])[: len(token_ids)] == token_ids:
                continue
            # The masks of this step are for these tokens: if they can't be written, no others may be accepted.
            self._num_drafts[slot] = 0
            drafts = self._req_states.draft_tokens
            drafts[slot, : len(token_ids)] = torch.tensor(token_ids, dtype=drafts.dtype, device=drafts.device)
            self._num_drafts[slot] = len(token_ids)
            self._survival[slot] = UNPROMISED
