"""Stores the target's predictions in each step of the V1 model runner.

A step's logits are noted before vLLM samples from them, and stored when it is known which draft tokens were accepted: a
rejected token's row predicts what follows a context that doesn't exist, and costs as much to store as any other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.alignment import PREFILL_CHUNK, AlignmentStore
from vllm_aasd.drafting.drafter import AlignmentView
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.kv_blocks import disown


class V1Alignment:
    """The alignment store of a worker, with the layout of a KV cache group.

    Args:
        runner: whose steps are stored.
        store: where.
        group: the KV cache group whose slots the store has.
        model: the target, whose ``compute_logits`` is called for prompt positions.
        faults: of the worker.
        loads_kv: whether a KV connector may fill blocks.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        store: AlignmentStore,
        group: int,
        model: torch.nn.Module,
        faults: Faults,
        loads_kv: bool = False,
    ) -> None:
        self._loads_kv = loads_kv
        self._runner = runner
        self._store = store
        self._group = group
        self._model = model
        self._faults = faults
        self._state: Any = None

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Clear the entries of former owners in blocks that a step gives to requests."""
        disown(self._store, scheduled, self._group, self._loads_kv, self._faults)

    def take_up(self, state: Any) -> None:
        """Keep a step's results, the runner's ``execute_model_state``, until `write`."""
        self._state = state

    def write(self, num_emitted: Sequence[int] | None = None) -> None:
        """Store the step that `take_up` has kept; does nothing if that was done.

        Args:
            num_emitted: per batch row, the tokens that it emits in this step; None stores all rows.
        """
        state, self._state = self._state, None
        if state is None or (self._faults.is_alone and self._faults.is_off("store")):
            return
        # Shared: all ranks must ask for logits equally often.
        with self._faults.contained("store", shared=True):
            self._align(state, num_emitted)

    def view(self, row: int) -> AlignmentView:
        """What is stored for the request in a row of the batch."""
        blocks = self._runner.input_batch.block_table[self._group]
        return AlignmentView(self._store.numpy(), blocks.block_table.np[row], blocks.block_size)

    def _align(self, state: Any, num_emitted: Sequence[int] | None) -> None:
        num_tokens = state.scheduler_output.total_num_scheduled_tokens
        token_ids = self._runner.input_ids.gpu[:num_tokens]
        slots = self._runner.input_batch.block_table[self._group].slot_mapping.gpu[:num_tokens]
        metadata = state.spec_decode_metadata
        sampled_rows = metadata.logits_indices
        sampled_slots = slots[sampled_rows]
        if num_emitted is not None:
            is_real = is_of_context(metadata.num_draft_tokens, num_emitted)
            sampled_slots[torch.from_numpy(~is_real).to(slots.device)] = -1
        self._store_rows(state.logits, token_ids[sampled_rows], sampled_slots)
        if len(sampled_rows) == num_tokens:
            return
        is_interior = torch.ones(num_tokens, dtype=torch.bool)
        is_interior[sampled_rows] = False
        for rows in is_interior.nonzero().squeeze(1).split(PREFILL_CHUNK):
            logits = self._model.compute_logits(state.hidden_states[rows])
            self._store_rows(logits, token_ids[rows], slots[rows])

    def _store_rows(self, logits: torch.Tensor, token_ids: torch.Tensor, slots: torch.Tensor) -> None:
        if not self._faults.is_off("store"):
            with self._faults.contained("store"):
                self._store.write(logits, token_ids, slots)


def is_of_context(num_draft_tokens: Sequence[int], num_emitted: Sequence[int]) -> np.ndarray:
    """Which rows of a step's logits belong to tokens that its requests keep.

    A request has a row for its last token, or the last of its prompt's chunk, and one for each draft token. The first
    is always part of the context; the others are if their tokens were accepted.

    Args:
        num_draft_tokens: per request, its draft tokens.
        num_emitted: per request, the tokens that it emitted; 0 for an unfinished prompt.

    Returns:
        ``[sum of (1 + num_draft_tokens)]`` bool.
    """
    is_real = np.ones(sum(num_draft_tokens) + len(num_draft_tokens), np.bool_)
    start = 0
    for drafted, emitted in zip(num_draft_tokens, num_emitted, strict=True):
        is_real[start + max(emitted, 1) : start + 1 + drafted] = False
        start += 1 + drafted
    return is_real
