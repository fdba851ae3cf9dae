"""The adapter of vLLM's V1 model runner.

`vllm_aasd.engine.worker` calls `begin_step`, then vLLM runs the forward pass, then `sampling` is active around vLLM's
sampling: `V1Verifier` verifies, vLLM calls `propose`, and the time of the step is noted.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_aasd.alignment import TOP_K, AlignmentStore
from vllm_aasd.counters import Counters
from vllm_aasd.drafting import drafter
from vllm_aasd.drafting.drafter import MIN_SURVIVAL, NO_ALIGNMENT, SEEDED, AlignmentView, Drafter
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.engine import shared_prior, startup
from vllm_aasd.engine.corpora import ServerCorpora
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.grammar.messages import InformedDraftTokenIds
from vllm_aasd.engine.namespaces import prediction_of
from vllm_aasd.engine.request_options import longest_draft
from vllm_aasd.engine.v1.alignment import V1Alignment
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.draft_lengths import V1DraftLengths
from vllm_aasd.engine.v1.draft_model import DraftModel
from vllm_aasd.engine.v1.model_drafts import Asked, ModelDrafts, agreement
from vllm_aasd.engine.v1.rejection_sampler import V1Verifier
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.engine.v1.vllm_workarounds import without_discarded_generators
from vllm_aasd.kernels import align, verify

logger = logging.getLogger("vllm.aasd")


class V1Adapter:
    """Drafts and verifies for one worker; see `vllm_aasd.engine.adapter.Adapter`.

    Args:
        vllm_config: with our speculative config.
        runner: the worker's.
        model: the target.
        kv_cache_config: of the KV cache that the runner has allocated; the alignment store has the same slots.
        draft_model: that drafts beside text; None if there is none.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        runner: GPUModelRunner,
        model: torch.nn.Module,
        kv_cache_config: KVCacheConfig,
        draft_model: DraftModel | None = None,
    ) -> None:
        speculative_config, scheduler_config = vllm_config.speculative_config, vllm_config.scheduler_config
        max_num_seqs = scheduler_config.max_num_seqs
        self._settings = settings = speculative_config.aasd
        self._model_config = vllm_config.model_config
        self._runner = runner
        self._model = model
        self._max_draft_tokens = speculative_config.num_speculative_tokens
        self._max_step_tokens = min(
            max_num_seqs * (1 + self._max_draft_tokens), scheduler_config.max_num_batched_tokens
        )
        self.faults = Faults(vllm_config.parallel_config.tensor_parallel_size)
        self.counters = Counters("cpu", self.faults.counts)
        self._lengths = V1DraftLengths(self._max_step_tokens, settings.draft_length == "adaptive", self.faults)
        self._requests = V1Requests(settings, self.faults, startup.shares_text(vllm_config))
        self.prior = prior = None if settings.prior == "off" else shared_prior.load_prior(self._model_config)
        self.corpora = ServerCorpora(self._model_config, speculative_config)
        self._drafter = Drafter(
            self._model_config.get_vocab_size(),
            self._max_draft_tokens,
            MIN_SURVIVAL,
            prior,
            lookups=self.counters.lookups.numpy(),
            texts=KnownTexts(startup.memory_bytes(settings), self._max_draft_tokens, self.corpora),
        )
        counting = V1Counting(self.counters, self.faults, max_num_seqs, self._max_draft_tokens)
        self._model_drafts: ModelDrafts | None = None
        if draft_model is not None:
            step_time = self._lengths.by_load.step_time
            self._model_drafts = ModelDrafts(draft_model, step_time, self.faults, self._drafter, max_num_seqs)
        counting.drafter = self._model_drafts or self._drafter
        self._verifier = V1Verifier(
            self._requests, max_num_seqs, vllm_config.device_config.device, self.faults, counting
        )
        self._alignment = self._new_alignment(kv_cache_config, vllm_config.kv_transfer_config is not None)
        self._has_proposed = False
        self._began = 0.0
        self._num_decode_tokens: int | None = None
        self._num_drafted: dict[str, int] = {}
        self._drafts: dict[str, list[int]] = {}
        self._survival = np.zeros((max_num_seqs, self._max_draft_tokens), np.float32)
        self._has_grammars = False
        self._warm_up(counting)

    def _new_alignment(self, kv_cache_config: KVCacheConfig, loads_kv: bool) -> V1Alignment | None:
        if not startup.may_align_prompts(self._settings.alignment, self._runner.lora_config is not None):
            return None
        group = startup.full_attention_group(kv_cache_config)
        if group is None:
            logger.info("aasd: no full-attention KV cache group, so drafts come from retrieval alone")
            return None
        store = AlignmentStore(
            kv_cache_config.num_blocks,
            kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size,
            TOP_K,
            self._runner.device,
        )
        return V1Alignment(self._runner, store, group, self._model, self.faults, loads_kv)

    def _warm_up(self, counting: V1Counting) -> None:
        """Compile the kernels, or load them from the cache on disk, before a request waits for them."""
        device = self._runner.device
        # vLLM's rejection sampler converts logits to float32; without it they have the model's dtype.
        for dtype in {torch.float32, self._model_config.dtype}:
            verify.warm_up(device, dtype)
        counting.warm_up()
        drafter.warm_up()
        if self._alignment is not None:
            align.warm_up(device, self._model_config.dtype)

    @torch.inference_mode()
    def profile(self) -> None:
        """Time steps of the warmed-up model, for draft lengths."""
        began = time.perf_counter()
        samples = startup.profile_steps(
            lambda num_tokens: startup.dummy_forward(self._runner, num_tokens),
            self._model.compute_logits,
            self._max_step_tokens,
            get_tp_group().broadcast_object,
        )
        step_time = self._lengths.by_load.step_time
        step_time.warm_start(samples)
        logger.info(
            "aasd: step times relative to one token: %s (timed in %.1f s)",
            " ".join(f"{count}:{step_time.relative()[count]:.2f}" for count in sorted(dict(samples))),
            time.perf_counter() - began,
        )
        if self._model_drafts is not None:
            self._model_drafts.profile()

    def take_logits(self) -> tuple[list[str], torch.Tensor]:
        """See `Adapter.take_logits`."""
        state, self._runner.execute_model_state = self._runner.execute_model_state, None
        return list(self._runner.input_batch.req_ids), state.logits

    def use_prior(self) -> None:
        """Nothing to do: the drafter reads `prior` itself."""

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Begin to time a step, note the placeholders of images, and drop the state of requests that have ended."""
        self._began = time.perf_counter()
        self._num_decode_tokens = None
        self._num_drafted = {}
        if self._alignment is not None:
            self._alignment.begin_step(scheduled)
        if self._model_drafts is not None:
            self._model_drafts.begin_step(scheduled)
        with self.faults.contained("requests"):
            self._requests.forget(scheduled.finished_req_ids)
            self._verifier.forget(scheduled.finished_req_ids)
            self._drafter.forget(scheduled.finished_req_ids)
            for req_id in scheduled.finished_req_ids:
                self._drafts.pop(req_id, None)
            self._lengths.learn(scheduled.scheduled_new_reqs)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """While it lasts, vLLM samples with our verifier; the predictions and the time of the step are recorded."""
        self._has_proposed = False
        if self._runner.execute_model_state is not None:
            self._begin_sampling(self._runner.execute_model_state)
        with self._verifier.active(), without_discarded_generators(self._runner):
            yield
        # If vLLM hasn't called `propose`.
        self._commit()
        seconds = time.perf_counter() - self._began
        if self._model_drafts is not None:
            seconds -= self._model_drafts.seconds
        self._lengths.observe(self._num_decode_tokens, seconds, bool(self._num_drafted))

    def _begin_sampling(self, state: Any) -> None:
        req_ids = self._runner.input_batch.req_ids
        self._verifier.begin_step(req_ids)
        for req_id in self._requests.admit(req_ids, self._runner.requests):
            self._admit(req_id)
        scheduled = state.scheduler_output
        with self.faults.contained("requests"):
            self._num_drafted = {
                req_id: len(drafts) for req_id, drafts in scheduled.scheduled_spec_decode_tokens.items()
            }
            self._has_grammars = scheduled.has_structured_output_requests
            if self._has_grammars:
                for req_id, drafts in scheduled.scheduled_spec_decode_tokens.items():
                    self._drafter.replaced(req_id, _num_equal(self._drafts.get(req_id, []), drafts))
            if len(state.spec_decode_metadata.logits_indices) == scheduled.total_num_scheduled_tokens:
                self._num_decode_tokens = scheduled.total_num_scheduled_tokens
        if self._alignment is not None:
            self._alignment.take_up(state)
            # vLLM is about to change the logits in place: by the grammar, and without drafts by the sampling
            # parameters. All rows belong to the context then.
            if scheduled.has_structured_output_requests or not self._num_drafted:
                self._commit()

    def _admit(self, req_id: str) -> None:
        request, params = self._requests[req_id], self._runner.requests[req_id].sampling_params
        with self.faults.contained("draft"):
            self._drafter.admit(req_id, request.namespace, prediction_of(params), request.corpora, request.sampling)

    def _commit(self, num_emitted: Sequence[int] | None = None) -> None:
        """Store the predictions of the step, if that hasn't been done; see `V1Alignment.write`."""
        if self._alignment is not None:
            self._alignment.write(num_emitted)

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray
    ) -> list[list[int]]:
        """Draft for every request of the batch that has sampled a token in this step.

        Args:
            sampled_token_ids: per batch row, the tokens emitted in this step; empty for an unfinished prefill.
            num_tokens_no_spec: ``[max_num_reqs]`` int32, tokens in each row's context, these included.
            token_ids_cpu: ``[max_num_reqs, max_model_len]`` int32, the contexts.

        Returns:
            Draft token ids per batch row.
        """
        self._has_proposed = True
        self._commit([len(sampled) for sampled in sampled_token_ids])
        if self._model_drafts is not None or not self.faults.is_off("draft"):
            with self.faults.contained("draft"):
                return self._draft_batch(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self._drafts = {}
        return [[] for _ in sampled_token_ids]

    def _draft_batch(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray
    ) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        survival = self._survival[: len(drafts)]
        survival.fill(0)
        req_ids = self._runner.input_batch.req_ids[: len(drafts)]
        min_draft_tokens = self._lengths.min_draft_tokens(len(drafts))
        asked: dict[int, Asked] = {}
        for row, (req_id, sampled) in enumerate(zip(req_ids, sampled_token_ids, strict=True)):
            if sampled and self._requests.is_drafted(req_id):
                num_tokens = int(num_tokens_no_spec[row])
                limit = longest_draft(self._runner.requests[req_id], num_tokens, self._max_draft_tokens)
                asked[row] = Asked(req_id, sampled, token_ids_cpu[row, :num_tokens], limit, self._drafter_of(row))
        for row, (req_id, sampled, token_ids, limit, drafted_by) in asked.items():
            if self.faults.is_off("draft") or not self._requests.has_text(req_id):
                continue
            # One request's failure must not cost the others their drafts.
            with self.faults.contained("draft"):
                self._learn_text(req_id, sampled)
                by_text = limit if drafted_by != "model" else 0
                context, candidates = self._context(row, token_ids)
                draft_token_ids, expected = self._drafter.draft(req_id, context, candidates, by_text, min_draft_tokens)
                drafts[row] = draft_token_ids.tolist()
                survival[row, : len(expected)] = expected
                continue
            self._requests.stop_text(req_id)
            self._drafter.abandon(req_id)
        if self._model_drafts is not None:
            drafts = self._model_drafts.improve(drafts, survival, asked, self._runner.requests)
        is_seeded = [self._requests[req_id].sampling == SEEDED for req_id in req_ids]
        drafts = self._lengths.before_placeholders(drafts, survival)
        self._drafts = dict(zip(req_ids, drafts, strict=True))
        return self._lengths.cut(drafts, survival, is_seeded)

    def _drafter_of(self, row: int) -> str:
        """What may draft for the request in a row; a draft model reads tokens only."""
        batch = self._runner.input_batch
        if self._model_drafts is None or row in batch.req_prompt_embeds:
            return "text"
        return self._requests[batch.req_ids[row]].drafter

    def _learn_text(self, req_id: str, sampled: list[int]) -> None:
        """Tell the drafter what became of its draft, or what the answer says about it if another was verified."""
        unused = None if self._model_drafts is None else self._model_drafts.replaced(req_id)
        if unused is None:
            self._drafter.verified(req_id, self._num_drafted.get(req_id, 0), len(sampled) - 1)
        else:
            self._drafter.verified(req_id, *agreement(unused, sampled))

    def _context(self, row: int, token_ids: np.ndarray) -> tuple[np.ndarray, AlignmentView]:
        """What a request drafts from: the tokens of its context, and the predictions stored at them."""
        if row in self._runner.input_batch.req_prompt_embeds:
            # vLLM writes no tokens for a prompt of embeddings: its part of the row is a former request's.
            request = self._runner.requests[self._runner.input_batch.req_ids[row]]
            return token_ids[request.num_prompt_tokens :], NO_ALIGNMENT
        return token_ids, NO_ALIGNMENT if self._alignment is None else self._alignment.view(row)

    def trimmed(self, drafts: DraftTokenIds) -> DraftTokenIds:
        """vLLM's drafts, but without the zeros that it schedules where a request nears the model's length.

        With what the scheduler needs to make others, where there are grammars.
        """
        if not self._has_proposed:
            drafts.draft_token_ids = [[] for _ in drafts.req_ids]
        elif self._has_grammars:
            whole = [self._drafts.get(req_id, []) for req_id in drafts.req_ids]
            survival = self._survival[: len(whole)]
            return InformedDraftTokenIds(
                drafts.req_ids, drafts.draft_token_ids, whole, survival, *self._lengths.times()
            )
        return drafts

    def corpora_changed(self) -> None:
        """Nothing to do: drafts come from the corpora's own index."""

    def clear_memory(self) -> None:
        """Forget the text of other requests."""
        self._drafter.clear_memory()
        if self._model_drafts is not None:
            self._model_drafts.clear()

    def shutdown(self) -> None:
        """Nothing to release: what is known of requests ends with the process."""


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two drafts share, from their beginning."""
    differing = (at for at, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)
    return next(differing, min(len(one), len(other)))
