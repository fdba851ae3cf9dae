"""vLLM's worker, extended to call our adapter. Only public methods of vLLM's `Worker` are extended.

The adapter depends on the model runner: `vllm_aasd.engine.v1.adapter` or `vllm_aasd.engine.v2.speculator`.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_aasd import __version__
from vllm_aasd.alignment import TOP_K
from vllm_aasd.counters import MetricValue
from vllm_aasd.engine import configuration, metrics, patching, prior_maker
from vllm_aasd.engine.adapter import Adapter
from vllm_aasd.engine.corpora import ServerCorpora
from vllm_aasd.engine.grammar.messages import CountedGrammarOutput
from vllm_aasd.engine.startup import kv_cache_share, warm_up_bytes
from vllm_aasd.kernels.draft import Prior

logger = logging.getLogger("vllm.aasd")


class AASDWorker(Worker):
    """Our part of a platform's worker; comes before that worker in the base classes."""

    _publisher: metrics.Publisher | None = None

    def init_device(self) -> None:
        """Also: replace vLLM's rejection sampler, and have the runner create our drafter."""
        if self.use_v2_model_runner != (self.speculative_config.method == configuration.V2_BASE_METHOD):
            found, expected = ("V2", "V1") if self.use_v2_model_runner else ("V1", "V2")
            raise RuntimeError(
                f"method 'aasd' was set up for vLLM's {expected} model runner, and vLLM chose {found}: "
                f"set VLLM_USE_V2_MODEL_RUNNER={int(self.use_v2_model_runner)}, or leave out what made it choose so"
            )
        if not self.use_v2_model_runner:
            super().init_device()
            # Before vLLM's first profiling run. The import would load the other runner too where it isn't needed.
            from vllm_aasd.engine.v1 import sampler_patches

            sampler_patches.install()
            return
        from vllm_aasd.engine.v2 import speculator as v2

        # The runner is made by super(), and makes the speculator.
        v2.install()
        super().init_device()

    @property
    def _drafter(self) -> Any:
        """What the runner knows of us: a speculator on V2, a proposer on V1; None but on the last pipeline rank."""
        runner = getattr(self, "model_runner", None)
        return getattr(runner, "speculator" if self.use_v2_model_runner else "drafter", None)

    @property
    def _adapter(self) -> Adapter | None:
        """Ours on the last pipeline rank; None on others, and where a start has failed."""
        return self._drafter if self.use_v2_model_runner else getattr(self._drafter, "adapter", None)

    def load_model(self, **kwargs: Any) -> None:
        """Also: attach the V2 speculator to the loaded model. V1's runner passes the model to our proposer."""
        super().load_model(**kwargs)
        if self.use_v2_model_runner and self._drafter is not None:
            self._drafter.attach(self.model_runner)

    def determine_available_memory(self) -> int:
        """As vLLM's, less what known text and, beside a KV cache of that size, the alignment store will take.

        And less what vLLM's warm-up makes beyond what it has measured, and beyond what it leaves unused.
        """
        available = super().determine_available_memory()
        if not self.use_v2_model_runner or self.cache_config.kv_cache_memory_bytes:
            return available
        if self._drafter is not None:
            available -= self._drafter.text_bytes
        if current_platform.is_cuda_alike():
            unused = self.init_snapshot.free_memory - self.requested_memory + self.peak_activation_memory
            vocab_size = self.model_config.get_vocab_size()
            available -= max(0, warm_up_bytes(self.vllm_config, vocab_size) - int(unused))
        has_store = self.speculative_config.aasd.alignment and self.lora_config is None
        return int(available * kv_cache_share(self.get_kv_cache_spec(), TOP_K)) if has_store else available

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Also lay out the alignment store next to the KV cache, compile our kernels, and log what is in force."""
        super().initialize_from_config(kv_cache_config)
        if self._drafter is not None:
            self._drafter.bind(self.model_runner, kv_cache_config)
        logger.info(
            "aasd %s is live: vLLM %s, %s model runner, backend %s, num_speculative_tokens=%d %s",
            __version__,
            patching.vllm_version(),
            "V2" if self.use_v2_model_runner else "V1",
            self.device.type,
            self.speculative_config.num_speculative_tokens,
            self.speculative_config.aasd.describe(),
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Also: compile our kernels, and find out what steps of the model cost, once it is compiled."""
        if self.use_v2_model_runner and self._drafter is not None:
            self._drafter.warm_up()
        times = super().compile_or_warm_up_model()
        if self._adapter is not None:
            self._adapter.profile()
            self._adapter.faults.clear()
            self._make_first_prior(self._adapter.prior)
            with self._adapter.faults.contained("metrics"):
                self._publish(self._adapter)
        return times

    def _make_first_prior(self, prior: Prior | None) -> None:
        seconds = self.speculative_config.aasd.prior
        if prior is None or seconds == 0 or (prior.ids >= 0).any():
            return
        obstacle = prior_maker.obstacle(self.vllm_config)
        if obstacle is not None:
            logger.info("aasd: %s, the server doesn't make a prior; `python -m vllm_aasd.prior` does", obstacle)
            return
        self.aasd_make_prior(float(seconds))

    def aasd_make_prior(self, seconds: float = math.inf) -> None:
        """Ask the target what follows the tokens that the prior lacks: for ``collective_rpc`` before any request."""
        if self._adapter is not None:
            kv_cache_config = self.model_runner.kv_cache_config
            prior_maker.make(self.vllm_config, kv_cache_config, self.execute_model, self._adapter, seconds)

    def _publish(self, adapter: Adapter) -> None:
        """Publish what is counted from now on among the server's metrics, unless statistics are off."""
        adapter.counters.clear()
        folder = self.speculative_config.aasd_metrics_folder
        # Ranks of a group count the same.
        if folder and get_tp_group().rank_in_group == 0:
            self._publisher = metrics.Publisher(
                adapter.counters,
                adapter.faults,
                folder,
                self.model_config.served_model_name,
                self.parallel_config.data_parallel_index,
                envs.VLLM_LOG_STATS_INTERVAL,
            )

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Also: begin to time the step, and drop the state of requests that have ended."""
        if self._adapter is not None:
            self._adapter.begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Also: store the step's predictions before vLLM's processors change the logits, and verify by ours."""
        if self._adapter is None:
            return super().sample_tokens(grammar_output)
        if isinstance(grammar_output, CountedGrammarOutput):
            self._adapter.counters.add_grammar(grammar_output.counts)
            self._adapter.faults.counts["grammar"] += grammar_output.num_faults
        with self._adapter.sampling():
            return super().sample_tokens(grammar_output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """As vLLM's, less what isn't a draft."""
        drafts = super().take_draft_token_ids()
        return drafts if drafts is None or self._adapter is None else self._adapter.trimmed(drafts)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Also: forget what the old weights answered."""
        super().reload_weights(*args, **kwargs)
        self.aasd_clear_memory()

    def finish_weight_update(self) -> None:
        """Also: forget what the old weights answered."""
        super().finish_weight_update()
        self.aasd_clear_memory()

    def aasd_clear_memory(self) -> None:
        """Forget the text of earlier requests: for ``collective_rpc("aasd_clear_memory")``."""
        if self._adapter is not None:
            self._adapter.clear_memory()

    def aasd_add_corpus(self, name: str, path: str) -> list[str] | None:
        """Add a corpus, in the place of what has its name: for ``collective_rpc("aasd_add_corpus", args=(...))``.

        Returns:
            The names that there are now; None from a rank that doesn't draft.

        Raises:
            ValueError: the name or path isn't allowed, or there is no room for it.
        """
        return self._change_corpora(lambda corpora: corpora.add_from(name, path))

    def aasd_drop_corpus(self, name: str) -> list[str] | None:
        """Drop a corpus: for ``collective_rpc("aasd_drop_corpus", args=("name",))``; see `aasd_add_corpus`."""
        return self._change_corpora(lambda corpora: corpora.remove(name))

    def _change_corpora(self, change: Callable[[ServerCorpora], list[str]]) -> list[str] | None:
        if self._adapter is None:
            return None
        names = change(self._adapter.corpora)
        self._adapter.corpora_changed()
        return names

    def aasd_faults(self) -> dict[str, int]:
        """How often each of `failsafe.COMPONENTS` has failed here: for ``collective_rpc("aasd_faults")``."""
        return {} if self._adapter is None else dict(self._adapter.faults.counts)

    def aasd_metrics(self) -> tuple[int, list[MetricValue]] | None:
        """The engine's number and its metrics, from the first rank: for ``collective_rpc("aasd_metrics")``."""
        if self._adapter is None or get_tp_group().rank_in_group != 0:
            return None
        return self.parallel_config.data_parallel_index, self._adapter.counters.read()

    def shutdown(self) -> None:
        """Also: let go of vLLM, and write the last metrics."""
        try:
            # vLLM also shuts down workers whose start failed.
            if self._adapter is not None:
                self._adapter.shutdown()
            super().shutdown()
        finally:
            if self._publisher is not None:
                self._publisher.stop()
