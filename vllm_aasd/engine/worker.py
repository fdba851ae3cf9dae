"""The worker that vLLM starts for `aasd`: its own CPU worker, with our adapter called around each step."""

import logging
from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_aasd import __version__
from vllm_aasd.drafting.drafter import NUM_ORDERS
from vllm_aasd.engine import seams, v1_verifier
from vllm_aasd.kernels import align, draft, verify

logger = logging.getLogger("vllm.aasd")


class AASDCPUWorker(CPUWorker):
    """vLLM's CPU worker on the V1 model runner; only public methods of `Worker` are extended."""

    def init_device(self) -> None:
        """Also: put our verifier where vLLM's rejection sampler looks, before its first profiling run."""
        super().init_device()
        v1_verifier.install()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Also: lay out the alignment store beside the KV cache, compile our kernels, say what is in force."""
        super().initialize_from_config(kv_cache_config)
        settings = self.speculative_config.aasd
        self.model_runner.drafter.bind(self.model_runner, kv_cache_config)
        draft.warm_up(NUM_ORDERS, settings.top_k)
        align.warm_up(self.device, self.model_config.dtype)
        # vLLM's rejection sampler hands over float32, whatever the model's dtype.
        verify.warm_up(self.device, torch.float32)
        logger.info(
            "aasd %s is live: vLLM %s, V1 model runner, backend %s, num_speculative_tokens=%d %s",
            __version__,
            seams.vllm_version(),
            self.device.type,
            self.speculative_config.num_speculative_tokens,
            settings.describe(),
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Also: find out what steps of the model cost, now that it is compiled."""
        times = super().compile_or_warm_up_model()
        self.model_runner.drafter.profile()
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Also: begin to time the step, and drop the state of requests that have ended."""
        self.model_runner.drafter.begin_step(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Also: store the step's predictions before vLLM's processors change the logits, and verify by ours."""
        proposer = self.model_runner.drafter
        proposer.begin_sampling()
        with proposer.verifier.active():
            output = super().sample_tokens(grammar_output)
        proposer.end_step()
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """As vLLM's, but never the rows of zeros that it schedules where a request nears the model's length."""
        drafts = super().take_draft_token_ids()
        if drafts is None or self.model_runner.drafter.has_proposed:
            return drafts
        return DraftTokenIds(drafts.req_ids, [[] for _ in drafts.req_ids])

    def aasd_clear_memory(self) -> None:
        """Unlearn what other requests taught: for ``collective_rpc("aasd_clear_memory")``."""
        self.model_runner.drafter.clear_memory()

    def shutdown(self) -> None:
        """Also: keep what was learnt."""
        # vLLM also shuts down workers whose start failed.
        drafter = getattr(getattr(self, "model_runner", None), "drafter", None)
        if drafter is not None:
            drafter.shutdown()
        super().shutdown()
