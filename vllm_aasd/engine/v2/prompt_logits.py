"""Stores the target's predictions at prompt positions, whose logits the V2 runner doesn't compute.

Under tensor parallelism each rank's lm_head gives the logits of a part of the vocabulary, and vLLM gathers the parts
into whole rows on every rank. Here each rank reduces its part to partial entries (`vllm_aasd.kernels.align`), and only
these are gathered, 4 (1 + 2k) bytes per row and rank. The parts come from the model's own `compute_logits`, with vLLM's
logits layer told not to gather (its argument ``skip_gather``), so that everything else the model does to hidden states
and logits is kept. If that doesn't give a plain part of the vocabulary, all ranks see it on the first call, and gather
whole rows from then on.
"""

import logging
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.kernels.align import align_shard

logger = logging.getLogger("vllm.aasd")

CHUNK = 1024
"""Prompt positions whose logits exist at once, as in vLLM's own `prompt_logprobs`: 1024 rows of a 152k vocabulary in
bfloat16 are 311 MB."""


class PromptLogits:
    """Computes the logits of prompt positions, a chunk at a time, and stores their predictions.

    Args:
        model: the loaded target, whose ``compute_logits`` is called on the last pipeline rank.
        top_k: predictions stored per position.
    """

    def __init__(self, model: torch.nn.Module, top_k: int) -> None:
        self._model = model
        self._top_k = top_k
        layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        self._may_shard = get_tp_group().world_size > 1 and len(layers) == 1
        self._heads: list[Any] | None = None
        if self._may_shard:
            layers[0].register_forward_pre_hook(self._without_gathering, with_kwargs=True)
        elif get_tp_group().world_size > 1:
            self._say_whole_rows(f"it has {len(layers)} logits layers of vLLM's")

    def warm_up(self, hidden_size: int, dtype: torch.dtype, store: AlignmentStore) -> None:
        """Compile what stores predictions at few positions and at many.

        Args:
            hidden_size: of the target.
            dtype: of its hidden states.
            store: whose device it is; nothing is stored.
        """
        for num_rows in (1, CHUNK):
            slots = torch.full((num_rows,), -1, dtype=torch.int64, device=store.table.device)
            self.store(slots.new_zeros(num_rows, hidden_size, dtype=dtype), slots.int(), slots, store)

    def rehearse(self, hidden_states: torch.Tensor) -> None:
        """Compute a chunk of logits for vLLM's measurement of memory.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``; at most one chunk is used.
        """
        self._chunk(hidden_states[:CHUNK])

    def store(
        self, hidden_states: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, store: AlignmentStore
    ) -> None:
        """Store the predictions at prompt positions, chunk by chunk.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``, the target's last.
            token_ids: ``[num_tokens]`` int32, the input tokens.
            slot_mapping: ``[num_tokens]`` int64, KV slots; -1 skips a position.
            store: where to.
        """
        chunks = zip(
            hidden_states.split(CHUNK),
            token_ids.split(CHUNK),
            slot_mapping.split(CHUNK),
            strict=True,
        )
        for hidden_chunk, ids, slots in chunks:
            logits, first_token_id = self._chunk(hidden_chunk)
            if first_token_id is None:
                store.write(logits, ids, slots)
                continue
            partials = align_shard(logits, slots, first_token_id, self._top_k)
            group = get_tp_group()
            # As float32, which every communicator supports: the shared memory of CPUs supports floats only.
            gathered = group.all_gather(partials.view(torch.float32), dim=0).view(torch.int32)
            store.write_shards(gathered.view(group.world_size, *partials.shape), ids, slots)

    def _chunk(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """Logits, and the first token's id if they are this rank's part of the vocabulary; None for whole rows."""
        if self._may_shard:
            self._heads = []
            try:
                logits = self._model.compute_logits(hidden_states)
            finally:
                heads, self._heads = self._heads, None
            reason = self._not_a_shard(heads, logits)
            if reason is None:
                indices = heads[0].shard_indices
                return logits[:, : indices.num_org_elements], indices.org_vocab_start_index
            # The model's structure decides, so all ranks get here on the same call.
            self._may_shard = False
            self._say_whole_rows(reason)
        return self._model.compute_logits(hidden_states), None

    def _without_gathering(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self._heads is None:
            return None
        self._heads.append(args[0] if args else kwargs.get("lm_head"))
        return args, {**kwargs, "skip_gather": True}

    def _not_a_shard(self, heads: list[Any], logits: torch.Tensor | None) -> str | None:
        """Why logits aren't one rank's plain part of the vocabulary; None if they are."""
        if len(heads) != 1:
            return f"its compute_logits calls the logits layer {len(heads)} times"
        head = heads[0]
        if not isinstance(head, VocabParallelEmbedding) or head.num_added_embeddings:
            return "its lm_head isn't split as vLLM's VocabParallelEmbedding is"
        if logits is None or logits.shape[1] != head.num_embeddings_per_partition:
            return "its compute_logits doesn't leave a part of the vocabulary as it is"
        ranks_before_last = get_tp_group().world_size - 1
        smallest = head.org_vocab_size - ranks_before_last * head.num_embeddings_per_partition
        if smallest < self._top_k:
            return f"the last rank's part of the vocabulary has only {max(smallest, 0)} tokens"
        return None

    @staticmethod
    def _say_whole_rows(reason: str) -> None:
        logger.info("aasd: prompt positions gather whole rows of logits over tensor ranks: of this model, %s", reason)
