"""The adapter of vLLM's V1 model runner: it gathers what the runner has, calls, and hands back.

One engine step, in the order in which `vllm_aasd.engine.worker` calls: `begin_step` (drops requests that have
ended), the runner's forward pass, `sampling` (around the rest: alignment store, then the runner's sampling by
`V1Verifier`, `propose`, step time).
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.alignment import PREFILL_CHUNK, TOP_K, AlignmentStore
from vllm_aasd.counters import Counters
from vllm_aasd.drafting.drafter import MAX_NGRAM_SIZE, MIN_SURVIVAL, NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.lengths import reproducible_lengths
from vllm_aasd.drafting.load import LengthsByLoad
from vllm_aasd.drafting.memory import new_memory
from vllm_aasd.engine import agreement, startup
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.mm_tokens import PlaceholderTokens
from vllm_aasd.engine.v1.alignment import V1Alignment
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.generators import set_aside
from vllm_aasd.engine.v1.rejection_sampler import V1Verifier
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.kernels import align, verify
from vllm_aasd.kernels.draft import cpu as draft
from vllm_aasd.kernels.verify import recovered

logger = logging.getLogger("vllm.aasd")


class AASDProposer:
    """vLLM's custom proposer, made by the runner on the last pipeline rank; bound to it when the KV cache exists."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        speculative_config = vllm_config.speculative_config
        scheduler_config = vllm_config.scheduler_config
        self._settings = speculative_config.aasd
        self._model_config = vllm_config.model_config
        self._loads_kv = vllm_config.kv_transfer_config is not None
        self._is_adaptive = self._settings.draft_length == "adaptive"
        self._max_draft_tokens = startup.max_draft_tokens(self._settings, speculative_config.num_speculative_tokens)
        self._max_step_tokens = min(
            scheduler_config.max_num_seqs * (1 + self._max_draft_tokens), scheduler_config.max_num_batched_tokens
        )
        self._lengths_by_load = LengthsByLoad(self._max_step_tokens)
        self._drafter: Drafter | None = None
        self._model: torch.nn.Module | None = None
        self._runner: GPUModelRunner | None = None
        self._alignment: V1Alignment | None = None
        self._began = 0.0
        self._num_decode_tokens: int | None = None
        self._num_drafted: dict[str, int] = {}
        self.faults = Faults(vllm_config.parallel_config.tensor_parallel_size)
        self.counters = Counters("cpu", self.faults.counts)
        self._requests = V1Requests(self._settings, self.faults)
        self.counting = V1Counting(self.counters, self.faults, scheduler_config.max_num_seqs, self._max_draft_tokens)
        self._verifier = V1Verifier(
            self._requests,
            scheduler_config.max_num_seqs,
            vllm_config.device_config.device,
            self.faults,
            self.counting,
        )
        self._has_proposed = False
        self._placeholders = PlaceholderTokens()

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the target model; there is no other to load."""
        self._model = target_model

    def bind(self, runner: GPUModelRunner, kv_cache_config: KVCacheConfig) -> None:
        """Set up the alignment store beside the KV cache that has just been laid out."""
        self._runner = runner
        # Compiled, or loaded from the cache on disk, before a request waits for it. vLLM's rejection sampler
        # hands over float32, whatever the model's dtype; without it they are as the lm_head made them.
        for dtype in {torch.float32, self._model_config.dtype}:
            verify.warm_up(runner.device, dtype)
        recovered.warm_up(runner.device, torch.float32)
        self.counting.warm_up()
        prior = agreement.load_prior(self._model_config) if self._settings.prior else None
        memory = new_memory(prior) if self._settings.memory == "process" else None
        draft.warm_up(MAX_NGRAM_SIZE, TOP_K)
        self._drafter = Drafter(
            self._model_config.get_vocab_size(),
            self._max_draft_tokens,
            MIN_SURVIVAL,
            prior,
            memory,
            lookups=self.counters.lookups.numpy(),
        )
        self.counting.drafter = self._drafter
        group = startup.full_attention_group(kv_cache_config)
        if group is None:
            logger.info("aasd: no full-attention KV cache group, so drafts come from retrieval alone")
            return
        store = AlignmentStore(
            kv_cache_config.num_blocks,
            kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size,
            TOP_K,
            runner.device,
        )
        align.warm_up(runner.device, self._model_config.dtype)
        self._alignment = V1Alignment(runner, store, group, self._model, self.faults, self._loads_kv)
        self._alignment.with_prompts = startup.may_align_prompts(
            self._settings.alignment is not False, has_lora=runner.lora_config is not None
        )

    @torch.inference_mode()
    def profile(self) -> None:
        """Time steps of the warmed-up model: the first step-time curve, and whether to align prompts."""
        if self._drafter is None:
            return
        profile = startup.profile_steps(
            lambda num_tokens: startup.dummy_forward(self._runner, num_tokens),
            self._model.compute_logits,
            self._max_step_tokens,
            min(PREFILL_CHUNK, self._runner.max_num_tokens),
            TOP_K,
        )
        self._lengths_by_load.warm_start(profile.samples)
        # All ranks make logits together, so they must agree on which; the first one's clock decides.
        alignment_share = get_tp_group().broadcast_object(profile.alignment_share)
        if self._alignment is not None and self._settings.alignment == "auto":
            self._alignment.with_prompts &= alignment_share <= startup.MAX_ALIGNMENT_SHARE
            if not self._alignment.with_prompts and self._settings.memory == "off":
                # At generated positions alone they make drafts no better (`benchmarks.ablation`), and take time.
                self._alignment = None
        is_stored = self._alignment is not None and self._alignment.with_prompts
        logger.info(
            "aasd: step times relative to one token: %s; predictions at prompt positions would take %.1f %% of "
            "a prompt's time and are %s",
            " ".join(
                f"{count}:{self._lengths_by_load.relative()[count]:.2f}" for count in sorted(dict(profile.samples))
            ),
            100 * alignment_share,
            "stored" if is_stored else "not stored",
        )

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Begin to time a step, learn what stands for images in new requests, and drop what ended ones left."""
        self._began = time.perf_counter()
        self._num_decode_tokens = None
        self._num_drafted = {}
        if self._alignment is not None:
            self._alignment.begin_step(scheduled)
        with self.faults.contained("requests"):
            self._placeholders.learn(scheduled.scheduled_new_reqs)
        with self.faults.contained("requests"):
            self._requests.forget(scheduled.finished_req_ids)
            self._verifier.forget(scheduled.finished_req_ids)
            if self._drafter is not None:
                self._drafter.forget(scheduled.finished_req_ids)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the runner's `sample_tokens`: what the step says is stored, and verified by our rule."""
        self._begin_sampling()
        with self._verifier.active(), set_aside(self._runner):
            yield
        self._end_step()

    def _end_step(self) -> None:
        # Where the runner had nothing proposed.
        if self._alignment is not None:
            self._alignment.write()
        if not self.faults.is_off("step_time"):
            with self.faults.contained("step_time"):
                self._lengths_by_load.observe(
                    self._num_decode_tokens, time.perf_counter() - self._began, bool(self._num_drafted)
                )

    def clear_memory(self) -> None:
        """Unlearn what other requests taught."""
        if self._drafter is not None:
            self._drafter.clear_memory()

    def shutdown(self) -> None:
        """Nothing to keep: what requests taught ends with the process."""

    def _begin_sampling(self) -> None:
        self._has_proposed = False
        runner = self._runner
        if runner is None or runner.execute_model_state is None:
            return
        req_ids = runner.input_batch.req_ids
        self._verifier.begin_step(req_ids)
        self._requests.admit(req_ids, runner.requests)
        state = runner.execute_model_state
        with self.faults.contained("requests"):
            scheduled = state.scheduler_output
            self._num_drafted = {
                req_id: len(drafts) for req_id, drafts in scheduled.scheduled_spec_decode_tokens.items()
            }
            if len(state.spec_decode_metadata.logits_indices) == scheduled.total_num_scheduled_tokens:
                self._num_decode_tokens = scheduled.total_num_scheduled_tokens
        if self._alignment is not None:
            self._alignment.take_up(state)
            # vLLM is about to change the logits in place: by the grammar, and without drafts by the sampling parameters. All
            # rows are of the context then.
            if state.scheduler_output.has_structured_output_requests or not self._num_drafted:
                self._alignment.write()

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
        self._has_proposed = True
        if self._alignment is not None:
            self._alignment.write([len(sampled) for sampled in sampled_token_ids])
        return self._drafts(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)

    def _drafts(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray
    ) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.faults.is_off("draft"):
            return drafts
        req_ids = self._runner.input_batch.req_ids
        # Nothing is written in the row for a prompt of embeddings: it holds its former occupant's.
        embedded = self._runner.input_batch.req_prompt_embeds
        survival = np.zeros((len(drafts), self._max_draft_tokens), np.float32)
        least = self._least(len(drafts))
        for row, sampled in enumerate(sampled_token_ids):
            req_id = req_ids[row]
            if not sampled or not self._requests.is_drafted(req_id):
                continue
            with self.faults.contained("draft"):
                context = token_ids_cpu[row, : num_tokens_no_spec[row]]
                limit = self._draft_limit(req_id, len(context))
                stored = NO_ALIGNMENT if self._alignment is None else self._alignment.view(row)
                if row in embedded:
                    context, stored = context[self._runner.requests[req_id].num_prompt_tokens :], NO_ALIGNMENT
                self._drafter.verified(req_id, self._num_drafted.get(req_id, 0), len(sampled) - 1)
                draft_token_ids, expected = self._drafter.draft(req_id, context, stored, limit, least)
                drafts[row] = self._placeholders.before_first(draft_token_ids.tolist())
                survival[row, : len(drafts[row])] = expected[: len(drafts[row])]
                continue
            self._requests.stop_drafting(req_id)
            self._drafter.abandon(req_id)
        if not self._is_adaptive:
            return drafts
        lengths = self._lengths(survival, req_ids)
        return [draft[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def _least(self, num_requests: int) -> int:
        if self._is_adaptive and not self.faults.is_off("step_time"):
            with self.faults.contained("step_time"):
                return self._lengths_by_load.least(num_requests)
        return 0

    def _lengths(self, survival: np.ndarray, req_ids: list[str]) -> np.ndarray:
        if not self.faults.is_off("step_time"):
            with self.faults.contained("step_time"):
                is_seeded = [self._requests[req_id].is_seeded for req_id in req_ids[: len(survival)]]
                return self._lengths_by_load.choose(survival, np.array(is_seeded, np.bool_))
        return reproducible_lengths(survival)

    def trimmed(self, drafts: DraftTokenIds) -> DraftTokenIds:
        """As vLLM's, but never the rows of zeros that it schedules where a request nears the model's length."""
        if self._has_proposed:
            return drafts
        return DraftTokenIds(drafts.req_ids, [[] for _ in drafts.req_ids])

    def _draft_limit(self, req_id: str, num_tokens: int) -> int:
        """No draft token past what the request may still emit, nor up to where it may stop: one token comes without a draft."""
        request = self._runner.requests[req_id]
        params = request.sampling_params
        if params is None:
            return self._max_draft_tokens
        num_emitted = num_tokens - request.num_prompt_tokens
        limit = self._max_draft_tokens
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens - num_emitted - 1)
        if params.min_tokens > num_emitted and params.all_stop_token_ids:
            # vLLM forbids a step's bonus token to stop the request if `min_tokens` weren't reached before its drafts.
            limit = min(limit, params.min_tokens - num_emitted - 1)
        return max(0, limit)
