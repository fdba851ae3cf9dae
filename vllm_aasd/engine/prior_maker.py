"""Makes a model's prior in its worker, before the first request: the likeliest tokens after each token.

The worker runs batches of prompts that each end in another token of the vocabulary. As in vLLM's own warm-up, the
prompts use KV cache blocks directly, since the scheduler hasn't assigned any block to a request yet.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed import get_tp_group, get_world_group
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_aasd.engine import shared_prior
from vllm_aasd.engine.adapter import Adapter
from vllm_aasd.kernels.draft import Prior

logger = logging.getLogger("vllm.aasd")

# What a template puts before every answer hardly changes what follows it.
_LONGEST_PREFIX = 64
# Larger batches gain nothing, and their logits take memory that vLLM hasn't set aside.
_MAX_BATCH_SIZE = 256
# Rows of logits that are converted to float32 at once.
_ROWS = 32
_REPORT_SECONDS = 10.0


def obstacle(vllm_config: VllmConfig) -> str | None:
    """Why a worker can't make a prior; None if it can."""
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        # All workers would have to run the same steps, or take turns, and they don't share a clock.
        return "with data or pipeline parallelism"
    if vllm_config.kv_transfer_config is not None:
        return "with a KV connector"
    return None


def make(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    execute: Callable[[SchedulerOutput], object],
    adapter: Adapter,
    seconds: float,
) -> None:
    """Add the successors that the adapter's prior lacks, and save the prior to disk; does nothing without a prior.

    Args:
        vllm_config: of the engine.
        kv_cache_config: of the KV cache, which no request uses yet.
        execute: the worker's ``execute_model``.
        adapter: the worker's.
        seconds: no step starts later than this.
    """
    began = time.monotonic()
    prior, model = adapter.prior, vllm_config.model_config
    if prior is None:
        return
    maker = PriorMaker(_prefix(model), vllm_config.scheduler_config, kv_cache_config, execute, adapter.take_logits)
    num_asked = maker.fill(prior, seconds, get_tp_group().broadcast_object)
    adapter.use_prior()
    logger.info(
        "aasd: asked %s what follows %d of its %d tokens, in %.0f s; `python -m vllm_aasd.prior %s` asks for the rest",
        model.model,
        num_asked,
        len(prior.ids),
        time.monotonic() - began,
        model.model,
    )
    if num_asked and get_world_group().local_rank == 0:
        shared_prior.keep_prior(model, prior)


def assistant_prefix(tokenizer: Any) -> list[int]:
    """What a chat template puts before the assistant's answer; without a usable template, what begins a text."""
    question = [{"role": "user", "content": "Why?"}]
    try:
        asked = tokenizer.apply_chat_template(question, tokenize=False)
        answering = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    # transformers raises ValueError without a template; a template may raise anything.
    except Exception:
        asked = answering = ""
    if len(answering) > len(asked) and answering.startswith(asked):
        return tokenizer.encode(answering[len(asked) :], add_special_tokens=False)
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _prefix(model: ModelConfig) -> list[int]:
    """What stands before each token: the beginning of an answer."""
    if model.skip_tokenizer_init:
        return []
    return assistant_prefix(cached_tokenizer_from_config(model))[-min(model.max_model_len - 2, _LONGEST_PREFIX) :]


class PriorMaker:
    """Asks the target for successors.

    Args:
        prefix: the token ids that stand before each token.
        scheduler_config: of the engine.
        kv_cache_config: of the KV cache, which no request uses yet.
        execute: the worker's ``execute_model``.
        take_logits: after `execute`, the requests of the step and their logits, ``[num_requests, vocab_size]``.
    """

    def __init__(
        self,
        prefix: list[int],
        scheduler_config: SchedulerConfig,
        kv_cache_config: KVCacheConfig,
        execute: Callable[[SchedulerOutput], object],
        take_logits: Callable[[], tuple[list[str], torch.Tensor]],
    ) -> None:
        self._execute, self._take_logits = execute, take_logits
        self._prefix = prefix
        length = len(prefix) + 1
        groups = kv_cache_config.kv_cache_groups
        self._num_blocks = [-(-length // group.kv_cache_spec.block_size) for group in groups]
        self._batch_size = min(
            _MAX_BATCH_SIZE,
            scheduler_config.max_num_seqs,
            scheduler_config.max_num_batched_tokens // length,
            (kv_cache_config.num_blocks - 1) // max(sum(self._num_blocks), 1),
        )

    def fill(self, prior: Prior, seconds: float, agree: Callable[[bool], bool]) -> int:
        """Add successors for the tokens that have none, in the order of token ids.

        In tokenizers that merge pairs, frequent tokens have low ids: the first 10,000 of the demo model's 49,152 tokens
        make up 85% of ordinary text.

        Args:
            prior: modified in place.
            seconds: no batch starts later than this.
            agree: returns the first tensor-parallel rank's argument on every rank, so that all run the same steps.

        Returns:
            The number of tokens whose successors were asked for.
        """
        began = reported = time.monotonic()
        missing = np.flatnonzero(prior.ids[:, 0] < 0)
        finished: set[str] = set()
        num_asked = 0
        while num_asked < len(missing) and self._batch_size and agree(time.monotonic() - began < seconds):
            token_ids = missing[num_asked : num_asked + self._batch_size].tolist()
            step = self._step(token_ids)
            step.finished_req_ids = finished
            self._execute(step)
            req_ids, logits = self._take_logits()
            asked = np.array([int(req_id.rpartition("-")[2]) for req_id in req_ids])
            for rows in np.array_split(np.arange(len(asked)), -(-len(asked) // _ROWS)):
                probs, ids = logits[rows].float().softmax(-1).topk(prior.ids.shape[1])
                prior.ids[asked[rows]] = ids.cpu().numpy()
                # A model may say nothing after a token that it never saw.
                prior.probs[asked[rows]] = probs.nan_to_num(0.0).cpu().numpy()
            finished = set(req_ids)
            num_asked += len(token_ids)
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("aasd: asked what follows %d of %d tokens", num_asked, len(missing))
        step = SchedulerOutput.make_empty()
        step.finished_req_ids = finished
        self._execute(step)
        return num_asked

    def _step(self, token_ids: list[int]) -> SchedulerOutput:
        """A step that prefills one prompt per token."""
        step = SchedulerOutput.make_empty()
        block = 1  # 0 is the null block
        for token_id in token_ids:
            blocks = []
            for count in self._num_blocks:
                blocks.append(list(range(block, block + count)))
                block += count
            prompt = [*self._prefix, token_id]
            request = NewRequestData(
                req_id=f"aasd-prior-{token_id}",
                prompt_token_ids=prompt,
                mm_features=[],
                sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
                pooling_params=None,
                block_ids=tuple(blocks),
                num_computed_tokens=0,
                lora_request=None,
                prefill_token_ids=prompt,
            )
            step.scheduled_new_reqs.append(request)
            step.num_scheduled_tokens[request.req_id] = len(prompt)
        step.total_num_scheduled_tokens = sum(step.num_scheduled_tokens.values())
        return step
