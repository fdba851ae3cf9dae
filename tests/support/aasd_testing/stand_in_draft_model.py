"""A draft model for the fake V1 runner, which knows the target's rule and checks what it is given to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from aasd_testing.fake_v2 import next_token
from vllm_aasd.drafting.computed_tokens import ComputedTokens
from vllm_aasd.engine.kv_blocks import new_blocks
from vllm_aasd.engine.v1.draft_model import Span


class StandInDraftModel:
    """Stands in for `DraftModel`.

    Its KV cache keeps which context each slot was read after, and a slot that is read after another one is an error.

    Args:
        num_blocks: blocks of the KV cache.
        block_size: slots of a block.
        wrong: which share of its tokens aren't the target's.

    Attributes:
        passes: the tokens of each pass.
    """

    max_tokens = max_pass_tokens = 1 << 20

    def __init__(self, num_blocks: int, block_size: int, wrong: float = 0.0) -> None:
        self.computed = ComputedTokens(num_blocks, block_size)
        self.passes: list[int] = []
        self._read_after: dict[int, tuple[int, ...]] = {}
        self._wrong = wrong
        self._rng = np.random.default_rng(0)
        self._runner: Any = None

    def load(self, target: Any) -> None:
        """There is nothing to load."""

    def bind(self, runner: Any, kv_cache_config: Any) -> None:
        """Read into the runner's blocks."""
        self._runner = runner

    def dummy_run(self, num_tokens: int) -> torch.Tensor:
        """Hidden states of any kind."""
        return torch.zeros(num_tokens, 2)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of any kind."""
        return hidden_states

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Forget blocks that change owners."""
        self.computed.invalidate(new_blocks(scheduled, 0, self.computed.block_size, loads_kv=False))

    def clear(self) -> None:
        """Forget all."""
        self.computed.clear()

    def num_read(self, row: int, token_ids: np.ndarray) -> int:
        """As `DraftModel.num_read`."""
        return self.computed.num_read(token_ids[:-1], self._blocks(row))

    def num_slots(self, row: int) -> int:
        """As `DraftModel.num_slots`."""
        return len(self._blocks(row)) * self.computed.block_size

    def read(self, spans: Sequence[Span]) -> list[tuple[int, ...]]:
        """Read, and return the whole context of each span."""
        self.passes.append(sum(len(span.token_ids) for span in spans))
        contexts = []
        for span in spans:
            slots = self.computed.slots(self._blocks(span.row), 0, span.end).tolist()
            context = self._read_after[slots[span.start - 1]] if span.start else ()
            assert [self._read_after[slot] for slot in slots[: span.start]] == [
                context[: at + 1] for at in range(span.start)
            ]
            for slot, token_id in zip(slots[span.start :], span.token_ids.tolist(), strict=True):
                context = (*context, token_id)
                self._read_after[slot] = context
            self.computed.note(span.token_ids, np.array(slots[span.start :]))
            contexts.append(context)
        return contexts

    def predict(self, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
        """The target's next token, or another, and how sure it is of it."""
        says = [int(next_token(*context[-2:])) for context in self.read(spans)]
        is_wrong = self._rng.random(len(says)) < self._wrong
        return [(token + bad) % 3 for token, bad in zip(says, is_wrong.tolist(), strict=True)], [0.9] * len(says)

    def _blocks(self, row: int) -> np.ndarray:
        return self._runner.input_batch.block_table[0].block_table.np[row]
