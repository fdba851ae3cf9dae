"""From ``--speculative-config '{"method": "aasd", ...}'`` to a speculative config that vLLM runs.

vLLM accepts a fixed list of methods, so ``aasd`` is built on a *base method* of vLLM's that loads no draft model. On
the V2 model runner, which GPUs run by default, that is ``ngram_gpu``: it keeps asynchronous scheduling and has every
request's tokens in device memory. On the V1 model runner it is ``custom_class``, which creates our proposer. A draft
model has a config of its own, that of vLLM's method ``draft_model``, and is loaded by our proposer.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_aasd.config import PREFIX, Settings, shown
from vllm_aasd.engine import corpus_names, metrics, patching, unsupported

logger = logging.getLogger("vllm.aasd")

METHOD = "aasd"
PROPOSER = "vllm_aasd.engine.v1.proposer.AASDProposer"
V1_BASE_METHOD = "custom_class"
V2_BASE_METHOD = "ngram_gpu"
MAX_SPECULATIVE_TOKENS = 128
"""vLLM's V1 rejection sampler takes no longer drafts (its ``MAX_SPEC_LEN``)."""

NUM_SPECULATIVE_TOKENS, NUM_SPECULATIVE_TOKENS_V1 = 7, 32
"""The default of `num_speculative_tokens`: in general, and on the V1 model runner without adapters.

The longest draft that the adaptive length may choose. Answers that were given before emit 24 tokens per step with 32
and 15 with 16 (in replay), and others lose nothing. On V2 a step takes the time of the longest draft, and with adapters
vLLM reserves room for this many tokens of every request in a batch.
"""

DRAFT_SCHEDULE = ((4, 7), (16, 3), (128, 1))
"""The initial draft lengths on V2 with asynchronous scheduling, as pairs of a number of requests and the length up to
it; more requests get no drafts. From there the best of these lengths, or none, is learned
(`vllm_aasd.drafting.batch_draft_length`). If nothing is ever accepted, they cost at most a tenth of the first 300 steps
(`tests/drafting/test_batch_draft_length.py`).

A step of n drafts has n + 1 tokens for each request. vLLM finds the full CUDA graph of a step only among those of the
next captured size, so each of these must divide the larger ones: else many steps run without (`is_nested`).
"""

NUM_SPECULATIVE_TOKENS_UNSCHEDULED = 2
"""`num_speculative_tokens` under data parallelism, where vLLM ignores a schedule."""

_LONGEST, _SCHEDULE = "num_speculative_tokens", "num_speculative_tokens_per_batch_size"


@config
class AASDSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config, extended by ours.

    Pickled with the rest of the configuration to every engine and worker process, so this module must be
    importable there before any plugin is loaded.
    """

    aasd: Settings | None = None
    """The settings; never None on a config that `create` made."""

    aasd_metrics_folder: str = ""
    """Where workers write their metrics, see `vllm_aasd.engine.metrics`; empty where statistics are off."""

    aasd_corpora_file: str = ""
    """Where workers write the names of the corpora, see `vllm_aasd.engine.corpora`."""

    aasd_draft_model: SpeculativeConfig | None = None
    """vLLM's config of the draft model, for one token at a time; None if there is none."""

    aasd_learns_widths: bool = False
    """Whether `num_speculative_tokens_per_batch_size` is ours, and the scheduler only starts with it."""

    def __repr__(self) -> str:
        settings = self.aasd.describe() if self.aasd is not None else ""
        schedule = self.num_speculative_tokens_per_batch_size
        by_requests = f" by requests {schedule}" if schedule is not None else ""
        if self.aasd_learns_widths:
            by_requests += " at first, then as learned"
        length = f"num_spec_tokens={self.num_speculative_tokens}{by_requests}"
        draft_model = self.aasd_draft_model and self.aasd_draft_model.model
        model = f"model={draft_model!r}, " if draft_model else ""
        return f"SpeculativeConfig(method='{METHOD}', {model}{length}, {settings})"


def install() -> list[patching.Replacement]:
    """Make the method known to `EngineArgs`; does nothing if it is."""
    return patching.replace({patching.CREATE_SPECULATIVE_CONFIG: _patch_create_speculative_config})


def _patch_create_speculative_config(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        if METHOD in (self.spec_method, (self.speculative_config or {}).get("method")):
            return _create(self, stock, target_model_config, target_parallel_config)
        for key, value in (self.speculative_config or {}).items():
            if key.replace("-", "_").startswith(PREFIX):
                # vLLM's own message would only call it unexpected.
                raise ValueError(
                    f"{key.replace('-', '_')}={shown(value)} is a setting of method '{METHOD}': "
                    f'add "method": "{METHOD}" to the speculative config, or leave the setting out.'
                )
        return stock(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _create(
    args: EngineArgs, stock: Callable, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> AASDSpeculativeConfig:
    """Refuse what can't work, then have vLLM build the base method's config, and extend it."""
    # It imports vLLM's API server, which workers, where this module is loaded too, have no use for.
    from vllm_aasd.engine import prediction

    patching.check_version()
    keys = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    settings = Settings.parse({key: value for key, value in keys.items() if key.startswith(PREFIX)})
    settings = _with_absolute_paths(settings)
    vllm_keys = {key: value for key, value in keys.items() if not key.startswith(PREFIX)}
    method = base_method(args)
    runner = "V2" if method == V2_BASE_METHOD else "V1"
    refusal = runner_refusal(runner)
    if refusal is not None:
        unsupported.refuse("model_runner", runner, refusal)
    unsupported.check(runner, args, vllm_keys, settings)
    unsupported.check_model(target_model_config)
    has_draft_model = vllm_keys.get("model") is not None
    if has_draft_model:
        unsupported.check_target_of_draft_model(target_model_config)
    elif settings.drafter == "model":
        unsupported.refuse(PREFIX + "drafter", "model", 'there is no draft model; add "model" to the config')
    draft_keys = {key: vllm_keys.pop(key) for key in unsupported.DRAFT_MODEL_KEYS if key in vllm_keys}

    longest = _longest(args, settings, runner, vllm_keys)
    schedule = _schedule(args, settings, runner, longest)
    if schedule and not is_nested(longest):
        logger.warning(
            "aasd: with num_speculative_tokens=%d, full CUDA graphs exist for some numbers of requests only; with 1, "
            "3, 7, 15 and so on, for all that vLLM captures",
            longest,
        )
    carried = schedule | vllm_keys | {"method": method, _LONGEST: longest}
    carried["model"] = PROPOSER if method == V1_BASE_METHOD else None
    drafted = draft_keys | {"method": unsupported.DRAFT_MODEL_METHOD, _LONGEST: 1} if has_draft_model else None
    given = keys, args.spec_method, args.spec_tokens
    args.spec_method = args.spec_tokens = None
    configs: list[SpeculativeConfig | None] = []
    try:
        for config in (carried, drafted):
            args.speculative_config = config
            configs.append(stock(args, target_model_config, target_parallel_config))
    finally:
        # vLLM may build its configuration from the same arguments twice.
        args.speculative_config, args.spec_method, args.spec_tokens = given
    stock_config, draft_config = configs
    unsupported.check_draft_model(draft_config)
    # As unpickling does: vLLM has validated these values, and would refuse some of its own on a second run.
    ours = object.__new__(AASDSpeculativeConfig)
    ours.__dict__.update(stock_config.__dict__)
    ours.aasd_draft_model = draft_config
    ours.aasd = dataclasses.replace(settings, fly_window=min(settings.fly_window, max(1, longest - 1)))
    ours.aasd_metrics_folder = "" if args.disable_log_stats else metrics.serving_folder()
    ours.aasd_corpora_file = corpus_names.names_file(settings)
    if method == V1_BASE_METHOD:
        # They are 0, which vLLM refuses when a config is copied with `replace`.
        ours.prompt_lookup_min = ours.prompt_lookup_max = None
    has_schedule_of_ours = bool(schedule) and _SCHEDULE not in vllm_keys
    if args.scheduler_cls is None:
        args.scheduler_cls = unsupported.SCHEDULER
    ours.aasd_learns_widths = has_schedule_of_ours and args.scheduler_cls == unsupported.SCHEDULER
    prediction.install()
    target_parallel_config.worker_cls = unsupported.CPU_WORKER if current_platform.is_cpu() else unsupported.GPU_WORKER
    return ours


def _with_absolute_paths(settings: Settings) -> Settings:
    """The settings, whose workers may run elsewhere.

    Raises:
        ValueError: naming a corpus that isn't there.
    """
    if settings.corpora is None:
        return settings
    for name, path in settings.corpora:
        if not os.path.exists(path):
            raise ValueError(f"{PREFIX}corpora={shown({name: path})} is not allowed: there is no such file or folder.")
    corpora = tuple((name, os.path.abspath(path)) for name, path in settings.corpora)
    return dataclasses.replace(settings, corpora=corpora)


def _longest(args: EngineArgs, settings: Settings, runner: str, vllm_keys: dict[str, Any]) -> int:
    """The longest draft: the user's `num_speculative_tokens`, or its default, within `aasd_draft_length`."""
    fixed = settings.draft_length if isinstance(settings.draft_length, int) else None
    if args.spec_tokens is None and _LONGEST not in vllm_keys:
        if fixed is not None:
            return fixed
        if runner == "V1":
            return NUM_SPECULATIVE_TOKENS if args.enable_lora else NUM_SPECULATIVE_TOKENS_V1
        is_unscheduled = args.data_parallel_size > 1 and not unsupported.is_synchronous(args)
        return NUM_SPECULATIVE_TOKENS_UNSCHEDULED if is_unscheduled else NUM_SPECULATIVE_TOKENS
    given = vllm_keys[_LONGEST] if args.spec_tokens is None else args.spec_tokens
    if type(given) is not int or not 1 <= given <= MAX_SPECULATIVE_TOKENS:
        raise ValueError(
            f"{_LONGEST}={shown(given)} is not allowed: it takes an integer from 1 to {MAX_SPECULATIVE_TOKENS}."
        )
    return given if fixed is None else min(given, fixed)


def _schedule(args: EngineArgs, settings: Settings, runner: str, longest: int) -> dict[str, Any]:
    """vLLM's key for draft lengths by the number of requests; empty if all have the same."""
    is_fixed = settings.draft_length != "adaptive" or runner == "V1" or args.data_parallel_size > 1
    if is_fixed or unsupported.is_synchronous(args):
        return {}
    learns = args.scheduler_cls in (None, unsupported.SCHEDULER)
    return {_SCHEDULE: _vllm_schedule(longest, args.max_num_seqs if learns else None)}


def _vllm_schedule(longest: int, most: int | None) -> list[tuple[int, int, int]]:
    """`DRAFT_SCHEDULE` as vLLM writes it: first and last number of requests, draft tokens, at most as many as first.

    Ends without drafts, because vLLM captures CUDA graphs for the scheduled lengths only, and our scheduler may choose
    to draft nothing for any number of requests (`vllm_aasd.engine.draft_length_schedule`). An entry ends at a multiple
    of 8 requests, as the sizes do that vLLM captures anyway: another one would come between these and their graphs.

    Args:
        longest: the most draft tokens.
        most: requests that a step may have, which get no drafts in this schedule; None if it isn't set, or if another
            scheduler follows the schedule.
    """
    entries: list[tuple[int, int, int]] = []
    first = 1
    for last, length in DRAFT_SCHEDULE:
        if most is not None and 2 <= most <= last:
            last = most - 1 if most <= 8 else (most - 1) // 8 * 8
        if first <= last:
            entries.append((first, last, min(length, longest) if entries else longest))
            first = last + 1
    # vLLM continues with the last entry.
    return [*entries, (first, first, 0)]


def is_nested(longest: int) -> bool:
    """Whether steps of the longest draft and of `DRAFT_SCHEDULE`'s have numbers of tokens that divide each other."""
    return all((longest + 1) % (min(length, longest) + 1) == 0 for _, length in DRAFT_SCHEDULE)


def base_method(args: EngineArgs) -> str:
    """vLLM's method for the model runner that it will choose for these arguments.

    vLLM decides by its finished configuration (`VllmConfig.use_v2_model_runner`), which includes the speculative one,
    so this predicts the decision by the same rules; the worker refuses to start if the prediction was wrong.
    """
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        if args.enable_dbo or args.ubatch_size > 1:
            return V1_BASE_METHOD
        if args.distributed_executor_backend == "external_launcher" and args.pipeline_parallel_size > 1:
            return V1_BASE_METHOD
    return V2_BASE_METHOD if chooses_v2() else V1_BASE_METHOD


def chooses_v2() -> bool:
    """Whether vLLM chooses its V2 model runner on this machine and in this environment, whatever the arguments."""
    return HAS_TRITON if envs.VLLM_USE_V2_MODEL_RUNNER is None else envs.VLLM_USE_V2_MODEL_RUNNER


def runner_refusal(runner: str) -> str | None:
    """Why aasd can't work with a model runner (``V1`` or ``V2``) on this machine's platform; None if it can."""
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return f"it runs on CUDA, ROCm and vLLM's CPU platform, and this is {current_platform.device_name}"
    if runner == "V1" and not current_platform.is_cpu():
        return (
            "on GPUs it needs vLLM's V2 model runner: install Triton, and leave out VLLM_USE_V2_MODEL_RUNNER, "
            "enable_dbo and ubatch_size"
        )
    return None
