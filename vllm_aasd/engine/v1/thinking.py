"""Thinking budgets (``thinking_token_budget``) on vLLM's V1 model runner, with the same results as without speculation.

With speculation configured, vLLM's holder of budgets counts the rows of a step by its drafts. It forces the end of
thinking at the wrong token if the start or the end of thinking is itself drafted, and one token late from the second
time on, with or without drafts. So requests with a budget have no drafts here, and the holder doesn't see those of
others.

With or without speculation, the holder also keeps the budget of a request that has ended when vLLM moves another
request into its row, and forces the end of thinking into a request that has no budget. Such budgets are dropped here.
"""

from collections.abc import Collection

import torch
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class UndraftedBudgets:
    """Replaces vLLM's holder for one step, in which a request with a budget has the bonus token's row only.

    Args:
        holder: vLLM's.
        rows: batch rows of the requests that have a budget.
    """

    def __init__(self, holder: ThinkingBudgetStateHolder, rows: Collection[int]) -> None:
        for row in [row for row in holder._state if row not in rows]:
            del holder._state[row]
        holder.in_spec_mode = False
        self._holder = holder
        self.has_tracked_requests = holder.has_tracked_requests
        self.update_state = holder.update_state

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: list[list[int]] | None
    ) -> torch.Tensor:
        """Force the end of thinking in place in the bonus rows, ``[batch_size, vocab_size]``, not in draft rows."""
        if not predict_bonus_token:
            return logits
        return self._holder.apply_to_logits(logits, predict_bonus_token=False, spec_token_ids=spec_token_ids)
