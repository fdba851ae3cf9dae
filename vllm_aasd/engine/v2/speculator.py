"""The adapter of vLLM's V2 model runner: it hands the device's state to our kernels and never waits for it.

One engine step, in the order of calls: the runner's forward pass, `sampling` (around the runner's `sample_tokens`), in
it the lm_head (`V2Alignment`), the sampler (`V2Verifier`) and `propose`. Everything is by request slot or by KV slot on
the device, so that nothing here knows which step the host is at: with asynchronous scheduling it is ahead.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_aasd.alignment import TOP_K, AlignmentStore
from vllm_aasd.counters import Counters
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, MAX_MATCHES, MAX_NGRAM_SIZE, MIN_SURVIVAL
from vllm_aasd.engine import patching, shared_prior, startup
from vllm_aasd.engine.corpora import ServerCorpora
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.grammar.messages import InformedDraftTokenIds
from vllm_aasd.engine.mm_tokens import PlaceholderTokens
from vllm_aasd.engine.v2 import rejection_sampler as v2_verifier
from vllm_aasd.engine.v2.alignment import V2Alignment
from vllm_aasd.engine.v2.grammar import V2GrammarDrafts
from vllm_aasd.engine.v2.prompt_logits import PromptLogits
from vllm_aasd.engine.v2.rejection_sampler import V2Verifier
from vllm_aasd.engine.v2.requests import RequestSlots
from vllm_aasd.engine.v2.texts import V2Texts
from vllm_aasd.engine.v2.warm_up import kinds_of_logits
from vllm_aasd.kernels.count import UNPROMISED
from vllm_aasd.kernels.draft import Prior, no_prior
from vllm_aasd.kernels.draft.batch import DraftBatch, draft_batch, draft_workspace

logger = logging.getLogger("vllm.aasd")


class AASDSpeculator(BaseSpeculator):
    """A speculator of the V2 model runner, made by the runner on the last pipeline rank.

    Args:
        vllm_config: with our speculative config.
        device: the runner's.
        req_states: the runner's state of requests, by slot.
    """

    supports_mm_inputs = False
    draft_logits = None
    """None: the drafts are certain of their tokens."""
    pcp_manager = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> None:
        self._config = vllm_config.speculative_config
        self._settings = settings = self._config.aasd
        self._model_config = vllm_config.model_config
        self._is_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._device = device
        self._req_states = req_states
        width = vllm_config.speculative_config.num_speculative_tokens
        self._align_prompts = startup.may_align_prompts(settings.alignment, vllm_config.lora_config is not None)
        self._prompt_logits: PromptLogits | None = None
        self._placeholders = PlaceholderTokens(device)
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        max_num_reqs = req_states.max_num_reqs
        self.faults = Faults(vllm_config.parallel_config.tensor_parallel_size)
        self._texts = V2Texts(
            startup.memory_bytes(settings), startup.shares_text(vllm_config), max_num_reqs, width, device
        )
        self.requests = RequestSlots(
            settings,
            req_states.index_to_req_id,
            req_states.max_seq_len,
            vllm_config.model_config,
            device,
            self._texts,
            self.faults,
        )
        self.counters = Counters(device, self.faults.counts)
        self._draft_token_ids = torch.zeros((max_num_reqs, width), dtype=torch.int64, device=device)
        # By slot.
        self._num_drafts = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._survival = torch.full((max_num_reqs, width), UNPROMISED, dtype=torch.float32, device=device)
        self.verifier = V2Verifier(self._num_drafts, self._survival, self.requests, self.faults, self.counters.totals)
        self._grammars = V2GrammarDrafts(req_states, self._num_drafts, self._survival)
        self._has_grammars = False
        # All but what is a step's own; None until the KV cache is laid out.
        self._batch: DraftBatch | None = None
        # Of the step that was drafted for last.
        self._idx_mapping = torch.zeros(0, dtype=torch.int64, device=device)
        self.prior: Prior | None = None
        self._device_prior: tuple[torch.Tensor, torch.Tensor]
        self._runner: GPUModelRunner | None = None
        self._alignment: V2Alignment | None = None
        self._loads_kv = vllm_config.kv_transfer_config is not None

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to set up: drafting runs beside vLLM's CUDA graphs, not in them."""

    def capture(self) -> None:
        """Nothing to capture."""

    def attach(self, runner: GPUModelRunner) -> None:
        """Attach to the runner, whose model and sampler are loaded by now."""
        self._runner = runner
        if self._settings.prior != "off":
            self.prior = shared_prior.load_prior(self._model_config)
        self.corpora = ServerCorpora(self._model_config, self._config)
        self._texts.learn_corpora(self.corpora)
        if self._align_prompts:
            self._prompt_logits = PromptLogits(runner.get_model(), TOP_K)
        runner.sampler.logits_processors.append(self.requests)

    @property
    def text_bytes(self) -> int:
        """Bytes of the device that known text will take."""
        return self._texts.nbytes

    def bind(self, runner: GPUModelRunner, kv_cache_config: KVCacheConfig) -> None:
        """Set up all that drafting needs, and beside the KV cache that has just been laid out, the alignment store.

        There is a store only where prompts are aligned: predictions at generated positions alone don't improve drafts
        (`benchmarks.drafter`), and take time.
        """
        group = startup.full_attention_group(kv_cache_config)
        if group is None:
            logger.info("aasd: no full-attention KV cache group, so drafts come from retrieval alone")
        if group is None or self._prompt_logits is None:
            top_k, block_size = 0, 1
            table = torch.zeros((0, 1), dtype=torch.int32, device=self._device)
            block_tables = torch.zeros((self._req_states.max_num_reqs, 1), dtype=torch.int32, device=self._device)
        else:
            top_k, block_size = TOP_K, runner.block_tables.block_sizes[group]
            store = AlignmentStore(kv_cache_config.num_blocks, block_size, top_k, self._device)
            self._alignment = V2Alignment(
                store,
                group,
                kv_cache_config.kv_cache_groups[group].layer_names[0],
                runner.get_model(),
                self._prompt_logits,
                self._vocab_size,
                self.faults,
                self._loads_kv,
            )
            table, block_tables = store.slots, runner.block_tables.block_tables[group].gpu
        prior = self.prior or no_prior()
        to_device = functools.partial(torch.as_tensor, device=self._device)
        self._device_prior = to_device(prior.ids), to_device(prior.probs)
        self._batch = DraftBatch(
            # vLLM may have lowered the model's length to fit the memory, and the block tables with it.
            all_token_ids=self._req_states.all_token_ids.gpu[:, : self._req_states.max_model_len],
            total_len=self._req_states.total_len.gpu,
            idx_mapping=self._idx_mapping,
            table=table,
            block_tables=block_tables,
            block_size=block_size,
            theta=to_device(DEFAULT_WEIGHTS.theta),
            alignment=to_device(DEFAULT_WEIGHTS.alignment),
            no_alignment_discount=to_device(DEFAULT_WEIGHTS.no_alignment_discount).reshape(1),
            prior_ids=self._device_prior[0],
            prior_probs=self._device_prior[1],
            vocab_size=self._vocab_size,
            max_matches=MAX_MATCHES,
            min_survival=MIN_SURVIVAL,
            texts=self._texts.bind(),
            max_len=self.requests.max_len,
            num_sampled=self._num_drafts[:0],
            excluded=self._placeholders.on_device,
            longest=0,
            workspace=draft_workspace(
                self._req_states.max_num_reqs,
                self._req_states.max_model_len,
                MAX_NGRAM_SIZE,
                MAX_MATCHES,
                top_k,
                prior.ids.shape[1],
                self._device,
            ),
            draft_token_ids=self._draft_token_ids[:0],
            num_drafts=self._num_drafts,
            survival=self._survival,
            lookups=self.counters.lookups,
        )

    def warm_up(self) -> None:
        """Compile all that serving can ask of our kernels, so that no request waits for a compiler.

        vLLM's own warm-up runs them too, but not for every kind of logits, and not at all with ``enforce_eager``.
        """
        if self._batch is None:
            return
        began = time.perf_counter()
        dtypes = (self._model_config.dtype, torch.float32)
        for logits in kinds_of_logits(self._vocab_size, dtypes, self._device):
            self.verifier.warm_up(logits)
            if self._alignment is not None:
                self._alignment.warm_up(logits)
        if self._alignment is not None and self._prompt_logits is not None:
            sizes = self._model_config.get_hidden_size(), self._model_config.dtype
            self._prompt_logits.warm_up(*sizes, self._alignment.store)
        batch = self._batch._replace(
            idx_mapping=torch.full((1,), -1, dtype=torch.int64, device=self._device),
            num_sampled=torch.zeros(1, dtype=torch.int32, device=self._device),
            draft_token_ids=self._draft_token_ids[:1],
        )
        self._texts.step(batch.all_token_ids, batch.total_len, batch.idx_mapping, batch.num_sampled)
        draft_batch(batch)
        # It waits: a kernel that can't run ends the start, not a request.
        self._num_drafts.sum().item()
        logger.info("aasd: its kernels were compiled in %.1f s", time.perf_counter() - began)

    def profile(self) -> None:
        """Nothing to time: what drafts cost the scheduler sees, `vllm_aasd.engine.draft_length_schedule`."""

    @torch.inference_mode()
    def take_logits(self) -> tuple[list[str], torch.Tensor]:
        """See `Adapter.take_logits`."""
        assert self._runner is not None
        runner = self._runner
        state, runner.execute_model_state = runner.execute_model_state, None
        rows = state.hidden_states[state.input_batch.logits_indices]
        return list(state.input_batch.req_ids), runner.get_model().compute_logits(rows)

    def use_prior(self) -> None:
        """Copy `prior` to the device."""
        assert self.prior is not None
        for on_device, array in zip(self._device_prior, self.prior, strict=False):
            on_device.copy_(torch.from_numpy(array))

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Learn what stands for images in new requests, and drop what ended ones left."""
        if self._alignment is not None:
            self._alignment.begin_step(scheduled)
        with self.faults.contained("requests", shared=True):
            self._placeholders.learn(scheduled.scheduled_new_reqs)
            self.requests.forget(scheduled.finished_req_ids)
        self._has_grammars = scheduled.has_structured_output_requests and not self._is_async
        if self._has_grammars:
            with self.faults.contained("draft", shared=True):
                self._grammars.write(scheduled.scheduled_spec_decode_tokens)

    def corpora_changed(self) -> None:
        """Draft from the corpora that there are now."""
        self._texts.write_corpora()

    def clear_memory(self) -> None:
        """Forget the text of other requests."""
        self._texts.clear()

    def shutdown(self) -> None:
        """Let go of the model; there is nothing to keep."""
        if self._alignment is not None:
            self._alignment.shutdown()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the runner's `sample_tokens`: the lm_head's rows are stored, and verified by our rule."""
        runner = self._runner
        if runner is None or runner.execute_model_state is None:
            yield
            return
        state = runner.execute_model_state
        batch, all_greedy = state.input_batch, False
        with self.verifier.contained:
            temperature = runner.sampler.sampling_states.temperature.np
            all_greedy = not temperature[batch.idx_mapping_np].any()
        with contextlib.ExitStack() as stack:
            if self._alignment is not None:
                stack.enter_context(self._alignment.sampling(batch, state.slot_mappings_by_layer))
            stack.enter_context(self.verifier.active(batch.idx_mapping_np, all_greedy))
            yield

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Learn from what this step emitted, and draft for every request of the batch that has sampled a token in it.

        Args:
            input_batch: the step's batch; its slots in ``idx_mapping``.
            slot_mappings: KV slots by layer, ``[num_tokens_padded]`` int64; None where there is no KV cache.
            last_hidden_states: ``[num_tokens_padded, hidden_size]``.
            num_sampled: ``[num_reqs]`` int32, tokens emitted in this step; 0 for an unfinished prefill.
            dummy_run: the batch is no request's: nothing is stored or drafted.
            is_profile: vLLM measures memory, so the largest chunk of logits must have been there once.
            num_speculative_tokens: the longest draft of this step, where it is less than the configured.
            **unused: what this and other versions of vLLM pass besides.

        Returns:
            ``[num_reqs, num_speculative_tokens of the config]`` int64, valid token ids throughout, since the
            runner feeds them to the model; how many are drafts is kept by slot for the verifier.
        """
        drafts = self._draft_token_ids[: input_batch.num_reqs]
        if dummy_run or self._batch is None:
            if is_profile and self._prompt_logits is not None:
                self._prompt_logits.rehearse(last_hidden_states)
            return drafts.zero_()
        if self._alignment is not None:
            self._alignment.store_prompts(input_batch, slot_mappings, last_hidden_states)
        self._idx_mapping = idx_mapping = input_batch.idx_mapping
        if not self.faults.is_off("draft"):
            with self.faults.contained("draft", shared=True):
                batch = self._batch._replace(
                    idx_mapping=idx_mapping,
                    num_sampled=num_sampled,
                    longest=drafts.shape[1] if num_speculative_tokens is None else num_speculative_tokens,
                    draft_token_ids=drafts,
                )
                self._texts.step(batch.all_token_ids, batch.total_len, idx_mapping, num_sampled)
                draft_batch(batch)
                return drafts
        self._num_drafts[idx_mapping] = 0
        return drafts.zero_()

    def trimmed(self, drafts: DraftTokenIds) -> DraftTokenIds:
        """What the scheduler is told to schedule: with synchronous scheduling, drafts only and no fillers.

        Asynchronous scheduling has the next step under way by now and never asks how many there are.
        """
        if self._is_async:
            return drafts
        ids: list[list[int]] = [[] for _ in drafts.req_ids]
        with self.faults.contained("draft"):
            counts = self._num_drafts[self._idx_mapping].tolist()
            ids = [ids[:count] for ids, count in zip(drafts.draft_token_ids, counts, strict=True)]
            if self._has_grammars:
                self._grammars.told(drafts.req_ids, ids)
                survival = self._survival[self._idx_mapping].cpu().numpy()
                return InformedDraftTokenIds(drafts.req_ids, ids, ids, survival)
        return DraftTokenIds(drafts.req_ids, ids)


def install() -> list[patching.Replacement]:
    """Have the V2 runner make our speculator and verify by our verifier; does nothing where it does already.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return [*patching.replace({patching.V2_INIT_SPECULATOR: _patch_init_speculator}), *v2_verifier.install()]


def _patch_init_speculator(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> Any:
        if getattr(vllm_config.speculative_config, "aasd", None) is not None:
            return AASDSpeculator(vllm_config, device, req_states)
        return stock(vllm_config, device, req_states)

    return init_speculator
