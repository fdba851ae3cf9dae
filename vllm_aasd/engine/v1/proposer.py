"""vLLM's way to us on the V1 model runner: a custom proposer, which creates our adapter once the KV cache exists."""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.engine.v1.adapter import V1Adapter
from vllm_aasd.engine.v1.draft_model import DraftModel


class AASDProposer:
    """A custom proposer, made by the runner on the last pipeline rank.

    Attributes:
        adapter: None until `bind`.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.adapter: V1Adapter | None = None
        self._vllm_config = vllm_config
        self._target_model: torch.nn.Module | None = None
        has_draft_model = vllm_config.speculative_config.aasd_draft_model is not None
        self._draft_model = DraftModel(vllm_config) if has_draft_model else None

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Keep the target model, and load the draft model if there is one."""
        self._target_model = target_model
        if self._draft_model is not None:
            self._draft_model.load(target_model)

    def bind(self, runner: GPUModelRunner, kv_cache_config: KVCacheConfig) -> V1Adapter:
        """Create the adapter.

        Args:
            runner: that has created this proposer, and loaded its model.
            kv_cache_config: that the runner has allocated its KV cache by.
        """
        if self._target_model is None:
            raise RuntimeError("bind() must be called after load_model()")
        if self._draft_model is not None:
            self._draft_model.bind(runner, kv_cache_config)
        self.adapter = V1Adapter(self._vllm_config, runner, self._target_model, kv_cache_config, self._draft_model)
        return self.adapter

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        **unused: Any,
    ) -> list[list[int]]:
        """See `V1Adapter.propose`.

        Args:
            sampled_token_ids, num_tokens_no_spec, token_ids_cpu: what that takes.
            **unused: what other versions of vLLM pass.
        """
        if self.adapter is None:
            return [[] for _ in sampled_token_ids]
        return self.adapter.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
