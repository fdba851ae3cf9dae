"""The adapter of vLLM's V1 model runner: it gathers what the runner has, calls, and hands back.

One engine step, in the order in which `vllm_aasd.engine.worker` calls: `forget` (requests that have ended),
the runner's forward pass, `begin_sampling` (alignment store), the runner's sampling (`V1Verifier`), `propose`.
"""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.spec_decode.ngram_proposer import NgramProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, AlignmentView, Drafter
from vllm_aasd.engine.v1_verifier import V1Verifier

logger = logging.getLogger("vllm.aasd")

PREFILL_CHUNK = 256
"""Prompt positions whose logits exist at once: 256 rows of a 152k vocabulary in bfloat16 are 78 MB."""


class AASDProposer:
    """vLLM's custom proposer, made by the runner on the last pipeline rank; bound to it when the KV cache exists."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        speculative_config = vllm_config.speculative_config
        self._settings = speculative_config.aasd
        self._max_draft_tokens = speculative_config.num_speculative_tokens
        self._drafter = Drafter(
            vllm_config.model_config.get_vocab_size(), self._max_draft_tokens, self._settings.min_survival
        )
        self._ngram = NgramProposer(vllm_config) if self._settings.draft == "ngram" else None
        self._model: torch.nn.Module | None = None
        self._runner: GPUModelRunner | None = None
        self._store: AlignmentStore | None = None
        self._store_group = 0
        self._align_prompts = False
        self.verifier = V1Verifier(
            self._settings, vllm_config.scheduler_config.max_num_seqs, vllm_config.device_config.device
        )
        self.has_proposed = False
        """Whether the runner has asked for drafts in this step."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the target model; there is no other to load."""
        self._model = target_model

    def bind(self, runner: GPUModelRunner, kv_cache_config: KVCacheConfig) -> None:
        """Set up the alignment store beside the KV cache that has just been laid out."""
        self._runner = runner
        if self._ngram is not None:
            return
        group = _full_attention_group(kv_cache_config)
        if group is None:
            logger.info("aasd: no full-attention KV cache group, so drafts come from retrieval alone")
            return
        self._store_group = group
        self._store = AlignmentStore(
            kv_cache_config.num_blocks,
            kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size,
            self._settings.top_k,
            runner.device,
        )
        # vLLM's copy-on-write of KV blocks then carries the entries along.
        runner.kv_caches.append(self._store.table)
        self._align_prompts = self._settings.alignment
        if self._align_prompts and runner.lora_config is not None:
            # lm_head maps adapters by sampler row, so prompt rows would get another request's adapter.
            logger.info("aasd: with LoRA, predictions are stored for generated tokens only")
            self._align_prompts = False

    def begin_sampling(self) -> None:
        """Store the target's predictions at every position of this step, while its logits are unprocessed."""
        self.has_proposed = False
        runner = self._runner
        if runner is None or runner.execute_model_state is None:
            return
        self.verifier.begin_step(runner.input_batch.req_ids, runner.requests)
        if self._store is not None:
            self._align(runner, runner.execute_model_state)

    def _align(self, runner: GPUModelRunner, state: Any) -> None:
        num_tokens = state.scheduler_output.total_num_scheduled_tokens
        token_ids = runner.input_ids.gpu[:num_tokens]
        slots = runner.input_batch.block_table[self._store_group].slot_mapping.gpu[:num_tokens]
        sampled_rows = state.spec_decode_metadata.logits_indices
        self._store.write(state.logits, token_ids[sampled_rows], slots[sampled_rows])
        if not self._align_prompts or len(sampled_rows) == num_tokens:
            return
        is_interior = torch.ones(num_tokens, dtype=torch.bool)
        is_interior[sampled_rows] = False
        for rows in is_interior.nonzero().squeeze(1).split(PREFILL_CHUNK):
            logits = self._model.compute_logits(state.hidden_states[rows])
            self._store.write(logits, token_ids[rows], slots[rows])

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        **unused: Any,
    ) -> list[list[int]]:
        """Draft for every request of the batch that has sampled a token in this step.

        Args:
            sampled_token_ids: per batch row, the tokens emitted in this step; empty for an unfinished prefill.
            num_tokens_no_spec: ``[max_num_reqs]`` int32, tokens in each row's context, these included.
            token_ids_cpu: ``[max_num_reqs, max_model_len]`` int32, the contexts.
            **unused: what other versions of vLLM pass besides.

        Returns:
            Draft token ids per batch row.
        """
        self.has_proposed = True
        if self._ngram is not None:
            return self._ngram.propose(
                self._max_draft_tokens, sampled_token_ids, num_tokens_no_spec, token_ids_cpu
            )
        req_ids = self._runner.input_batch.req_ids
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            if not sampled:
                drafts.append([])
                continue
            context = token_ids_cpu[row, : num_tokens_no_spec[row]]
            limit = self._draft_limit(req_ids[row], len(context))
            draft_token_ids, _ = self._drafter.draft(req_ids[row], context, self._alignment_of(row), limit)
            drafts.append(draft_token_ids.tolist())
        return drafts

    def _draft_limit(self, req_id: str, num_tokens: int) -> int:
        """No draft token past what the request may still emit: one token comes without a draft."""
        request = self._runner.requests[req_id]
        max_tokens = request.sampling_params.max_tokens if request.sampling_params else None
        if max_tokens is None:
            return self._max_draft_tokens
        remaining = max_tokens - (num_tokens - request.num_prompt_tokens)
        return max(0, min(self._max_draft_tokens, remaining - 1))

    def _alignment_of(self, row: int) -> AlignmentView:
        if self._store is None:
            return NO_ALIGNMENT
        blocks = self._runner.input_batch.block_table[self._store_group]
        return AlignmentView(self._store.numpy(), blocks.block_table.np[row], blocks.block_size)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop the state of requests that have ended."""
        self._drafter.forget(req_ids)
        self.verifier.forget(req_ids)


def _full_attention_group(kv_cache_config: KVCacheConfig) -> int | None:
    """The KV cache group whose blocks keep every token of a request."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    return None
