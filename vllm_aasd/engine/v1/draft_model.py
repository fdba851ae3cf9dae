"""A draft model on the V1 model runner: vLLM's own ``draft_model`` proposer, one forward pass at a time.

vLLM's proposer loads the model, gives it a part of the KV cache, and runs it in every step for every request, always
for as many tokens. Here it loads and runs the model too, but only for the requests and tokens that are asked for.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.drafting.computed_tokens import ComputedTokens
from vllm_aasd.engine import startup
from vllm_aasd.engine.kv_blocks import new_blocks
from vllm_aasd.engine.unsupported import refuse


class Span(NamedTuple):
    """Tokens of a request for the draft model to read.

    Attributes:
        row: of the batch.
        start: the position of the first; all before it have been read.
        token_ids: ``[n]`` int32, n >= 1.
    """

    row: int
    start: int
    token_ids: np.ndarray

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)


class DraftModel:
    """Runs a draft model, and knows what it has read.

    Args:
        vllm_config: of the engine; its speculative config has the draft model's.

    Attributes:
        max_tokens: of a context that it can read.
        max_pass_tokens: that it can read in one pass.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = copy.copy(vllm_config)
        config.speculative_config = vllm_config.speculative_config.aasd_draft_model
        self._proposer = DraftModelProposer(config, vllm_config.device_config.device)
        self.max_tokens = config.speculative_config.draft_model_config.max_model_len
        self.max_pass_tokens = self._proposer.max_num_tokens
        self._runner: Any = None
        self._computed: ComputedTokens | None = None

    def load(self, target: torch.nn.Module) -> None:
        """Load the draft model."""
        self._proposer.load_model(target)

    def bind(self, runner: GPUModelRunner, kv_cache_config: KVCacheConfig) -> None:
        """Use the part of the KV cache that the runner has allocated for it.

        Raises:
            ValueError: its layers don't keep every token of a request, so it can't go on from what it has read.
        """
        self._proposer.initialize_attn_backend(kv_cache_config, runner._kernel_block_sizes)
        self._proposer.initialize_cudagraph_keys(runner.compilation_config.cudagraph_mode)
        self._runner = runner
        group = kv_cache_config.kv_cache_groups[self._proposer.kv_cache_gid]
        if not startup.keeps_every_token(group.kv_cache_spec):
            name = self._proposer.speculative_config.model
            refuse("model", name, "it has layers without full attention; allowed is a model with full attention only")
        self._computed = ComputedTokens(kv_cache_config.num_blocks, group.kv_cache_spec.block_size)

    def dummy_run(self, num_tokens: int) -> torch.Tensor:
        """Run it on dummy tokens; returns hidden states that as many logits can be computed from."""
        self._proposer.dummy_run(num_tokens)
        return self._proposer.hidden_states[:num_tokens]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From hidden states to logits."""
        return self._proposer.model.compute_logits(hidden_states)

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Forget what former owners of a step's blocks have had read into them."""
        computed = self._of_kv_cache
        computed.invalidate(new_blocks(scheduled, self._proposer.kv_cache_gid, computed.block_size, loads_kv=False))

    def clear(self) -> None:
        """Forget all that it has read."""
        self._of_kv_cache.clear()

    def num_read(self, row: int, token_ids: np.ndarray) -> int:
        """How many tokens of a request's context it has read; never the last one."""
        return self._of_kv_cache.num_read(token_ids[:-1], self._blocks(row))

    def num_slots(self, row: int) -> int:
        """How many tokens of a request it could read into the blocks that the request has."""
        return min(len(self._blocks(row)) * self._of_kv_cache.block_size, self.max_tokens)

    def read(self, spans: Sequence[Span]) -> torch.Tensor:
        """Read tokens in one forward pass.

        Args:
            spans: of different requests, within their `num_slots`.

        Returns:
            ``[len(spans), hidden_size]``, hidden states at the last token of each.
        """
        proposer, computed = self._proposer, self._of_kv_cache
        token_ids = np.concatenate([span.token_ids for span in spans])
        slots = np.concatenate([computed.slots(self._blocks(span.row), span.start, span.end) for span in spans])
        positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
        starts = np.cumsum([0, *(len(span.token_ids) for span in spans)]).astype(np.int32)
        num_tokens = len(token_ids)
        proposer.input_ids[:num_tokens] = torch.from_numpy(token_ids)
        proposer.positions[:num_tokens] = torch.from_numpy(positions)
        _, metadata = proposer.build_per_group_and_layer_attn_metadata(self._metadata(spans, starts, slots))
        mode, num_padded, across_ranks = proposer._determine_batch_execution_and_padding(num_tokens)
        with set_forward_context(
            metadata,
            proposer.vllm_config,
            num_tokens=num_padded,
            num_tokens_across_dp=across_ranks,
            cudagraph_runtime_mode=mode,
            slot_mapping=proposer._get_slot_mapping(num_padded, torch.from_numpy(slots)),
        ):
            hidden_states = proposer.model(
                input_ids=proposer.input_ids[:num_padded],
                positions=proposer.positions[:num_padded],
                inputs_embeds=None,
            )
        computed.note(token_ids, slots)
        return hidden_states[torch.from_numpy(starts[1:] - 1)]

    def predict(self, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
        """Read tokens, and say what comes after.

        Returns:
            The likeliest next token of each request, and its probability.
        """
        logits = self.compute_logits(self.read(spans)).float()
        highest, token_ids = logits.max(-1)
        return token_ids.tolist(), torch.exp(highest - logits.logsumexp(-1)).tolist()

    @property
    def _of_kv_cache(self) -> ComputedTokens:
        if self._computed is None:
            raise RuntimeError("bind() must be called first")
        return self._computed

    def _blocks(self, row: int) -> np.ndarray:
        table = self._runner.input_batch.block_table[self._proposer.kv_cache_gid]
        return table.block_table.np[row, : table.num_blocks_per_row[row]]

    def _metadata(self, spans: Sequence[Span], starts: np.ndarray, slots: np.ndarray) -> CommonAttentionMetadata:
        table = self._runner.input_batch.block_table[self._proposer.kv_cache_gid].block_table.cpu
        query_start_loc = torch.from_numpy(starts)
        seq_lens = torch.tensor([span.end for span in spans], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(spans),
            num_actual_tokens=len(slots),
            max_query_len=max(len(span.token_ids) for span in spans),
            max_seq_len=max(span.end for span in spans),
            block_table_tensor=table[[span.row for span in spans]],
            slot_mapping=torch.from_numpy(slots),
        )
