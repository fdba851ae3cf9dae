"""The target's predictions on the V2 model runner, on their way into the alignment store."""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.kv_blocks import disown
from vllm_aasd.engine.v2.prompt_logits import PromptLogits

logger = logging.getLogger("vllm.aasd")


class V2Alignment:
    """The alignment store of a worker, laid out like the KV cache group that it lies beside.

    The target's raw logits exist for a moment only: the runner masks them in place by the grammar as soon as the model
    has returned them, and hands them to the sampler, which may copy them or not. So predictions at generated positions
    are stored where the model's own logits layer returns, by PyTorch's hook. Those at prompt positions are made for it.

    Args:
        store: to write to.
        group: the KV cache group whose slots the store's are.
        layer: a layer of that group.
        model: the target.
        prompt_logits: makes the logits of prompt positions.
        vocab_size: the columns of whole rows of logits.
        faults: of the worker.
        loads_kv: whether a KV connector may fill blocks.

    Attributes:
        store: as given.
    """

    def __init__(
        self,
        store: AlignmentStore,
        group: int,
        layer: str,
        model: torch.nn.Module,
        prompt_logits: PromptLogits,
        vocab_size: int,
        faults: Faults,
        loads_kv: bool,
    ) -> None:
        self.store = store
        self._group = group
        self._layer = layer
        self._prompt_logits = prompt_logits
        self._vocab_size = vocab_size
        self._faults = faults
        self._loads_kv = loads_kv
        # Input tokens and KV slots of the rows that are about to be sampled from.
        self._expected: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hooks: list[RemovableHandle] = [
            module.register_forward_hook(lambda module, args, logits: self._store_sampled(logits))
            for module in model.modules()
            if isinstance(module, LogitsProcessor | LogitsProcessorWithLoRA)
        ]
        if not self._hooks:
            logger.warning("aasd: the model has no logits layer of vLLM's, so no predictions are stored as it decodes")

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compile what stores predictions of logits of a kind: ``[num_rows, vocab_size]``."""
        of_row = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
        self.store.write(logits, of_row.int(), of_row)

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Forget what former owners left in blocks that a step gives to requests."""
        disown(self.store, scheduled, self._group, self._loads_kv, self._faults)

    @contextlib.contextmanager
    def sampling(self, batch: InputBatch, slot_mappings: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """While it lasts, the next logits of the model are stored.

        Args:
            batch: the step's.
            slot_mappings: KV slots by layer, ``[num_tokens_padded]`` int64; None where there is no KV cache.
        """
        if slot_mappings is not None and not self._faults.is_off("store"):
            with self._faults.contained("store", shared=True):
                rows = batch.logits_indices
                self._expected = batch.input_ids[rows], slot_mappings[self._layer][rows]
        try:
            yield
        finally:
            self._expected = None

    def _store_sampled(self, logits: torch.Tensor | None) -> None:
        # The first call in a step is the one that is sampled from; prompt log-probabilities come later.
        if self._expected is None:
            return
        (token_ids, slots), self._expected = self._expected, None
        # On ranks that sample for a part of the batch or see a part of the vocabulary there is no whole row.
        if logits is not None and logits.shape == (len(token_ids), self._vocab_size):
            with self._faults.contained("store", shared=True):
                self.store.write(logits, token_ids, slots)

    def store_prompts(
        self, batch: InputBatch, slot_mappings: dict[str, torch.Tensor] | None, hidden_states: torch.Tensor
    ) -> None:
        """Store predictions at this step's prompt positions.

        Those that were sampled from are stored again: by request, the host knows the prompt's rows, and only the device
        knows which were sampled from.

        Args:
            batch: the step's.
            slot_mappings: as for `sampling`.
            hidden_states: ``[num_tokens_padded, hidden_size]``, the target's last.
        """
        if slot_mappings is None or self._faults.is_off("store"):
            return
        with self._faults.contained("store", shared=True):
            slots = slot_mappings[self._layer]
            # Requests that stand side by side are taken together: each pass reads the whole lm_head.
            changes = np.diff(batch.is_prefilling_np.astype(np.int8), prepend=0, append=0)
            for first, end in zip((changes > 0).nonzero()[0], (changes < 0).nonzero()[0], strict=True):
                rows = slice(int(batch.query_start_loc_np[first]), int(batch.query_start_loc_np[end]))
                self._prompt_logits.store(hidden_states[rows], batch.input_ids[rows], slots[rows], self.store)

    def shutdown(self) -> None:
        """Release the model."""
        for hook in self._hooks:
            hook.remove()
