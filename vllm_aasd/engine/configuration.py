"""From ``--speculative-config '{"method": "aasd", ...}'`` to a speculative config that vLLM runs.

vLLM accepts a fixed list of methods, so ``aasd`` is built on a *base method* of vLLM's that loads no draft model. On
the V2 model runner, which GPUs run by default, that is ``ngram_gpu``: it keeps asynchronous scheduling and has every
request's tokens in device memory. On the V1 model runner it is ``custom_class``, which creates our proposer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_aasd.config import (
    DRAFT_SCHEDULE,
    NUM_SPECULATIVE_TOKENS,
    NUM_SPECULATIVE_TOKENS_UNSCHEDULED,
    NUM_SPECULATIVE_TOKENS_V1,
    PREFIX,
    Settings,
)
from vllm_aasd.engine import metrics, patching, unsupported
from vllm_aasd.fields import shown

METHOD = "aasd"
PROPOSER = "vllm_aasd.engine.v1.proposer.AASDProposer"
V1_BASE_METHOD = "custom_class"
V2_BASE_METHOD = "ngram_gpu"
MAX_SPECULATIVE_TOKENS = 128
"""vLLM's V1 rejection sampler takes no longer drafts (its ``MAX_SPEC_LEN``)."""

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

    aasd_learns_widths: bool = False
    """Whether `num_speculative_tokens_per_batch_size` is ours, and only what the scheduler begins from."""

    def __repr__(self) -> str:
        settings = self.aasd.describe() if self.aasd is not None else ""
        schedule = self.num_speculative_tokens_per_batch_size
        by_requests = f" by requests {schedule}" if schedule is not None else ""
        if self.aasd_learns_widths:
            by_requests += " at first, then as learnt"
        length = f"num_spec_tokens={self.num_speculative_tokens}{by_requests}"
        return f"SpeculativeConfig(method='{METHOD}', {length}, {settings})"


def install() -> list[patching.Replacement]:
    """Teach `EngineArgs` the method; does nothing where it knows it already."""
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
                # vLLM would call it unexpected, and not say why.
                raise ValueError(
                    f"{key.replace('-', '_')}={shown(value)} is a setting of method '{METHOD}': "
                    f'add "method": "{METHOD}" to the speculative config, or leave the setting out.'
                )
        return stock(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _create(
    args: EngineArgs, stock: Callable, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> AASDSpeculativeConfig:
    """Check everything that can't work, then have vLLM build the base method's config, and extend it."""
    # It imports vLLM's API server, which workers, where this module is loaded too, have no use for.
    from vllm_aasd.engine import prediction

    patching.check_version()
    keys = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    settings = Settings.parse({key: value for key, value in keys.items() if key.startswith(PREFIX)})
    vllm_keys = {key: value for key, value in keys.items() if not key.startswith(PREFIX)}
    method = base_method(args)
    runner = "V2" if method == V2_BASE_METHOD else "V1"
    refusal = runner_refusal(runner)
    if refusal is not None:
        unsupported.refuse("model_runner", runner, refusal)
    unsupported.check(runner, args, vllm_keys, settings)
    unsupported.check_model(target_model_config)

    carried = {**vllm_keys, "method": method, "model": PROPOSER if method == V1_BASE_METHOD else None}
    lengths = _lengths(args, settings, runner, _given_length(args, carried))
    if args.spec_tokens is not None:
        # vLLM takes it from there by itself.
        del lengths[_LONGEST]
    carried = lengths | carried
    args.speculative_config = carried
    spec_method, args.spec_method = args.spec_method, None
    try:
        stock_config = stock(args, target_model_config, target_parallel_config)
    finally:
        # vLLM may build its configuration from the same arguments again.
        args.speculative_config, args.spec_method = keys, spec_method
    # As unpickling does: vLLM has validated these values, and would refuse some of its own on a second run.
    ours = object.__new__(AASDSpeculativeConfig)
    ours.__dict__.update(stock_config.__dict__)
    longest_window = max(1, ours.num_speculative_tokens - 1)
    ours.aasd = dataclasses.replace(settings, fly_window=min(settings.fly_window, longest_window))
    ours.aasd_metrics_folder = "" if args.disable_log_stats else metrics.serving_folder()
    if method == V1_BASE_METHOD:
        # It leaves 0, which vLLM's own ranges don't allow when a config is copied with `replace`.
        ours.prompt_lookup_min = ours.prompt_lookup_max = None
    has_schedule_of_ours = _SCHEDULE in carried and _SCHEDULE not in vllm_keys
    if has_schedule_of_ours and args.scheduler_cls is None:
        args.scheduler_cls = unsupported.SCHEDULER
    ours.aasd_learns_widths = has_schedule_of_ours and args.scheduler_cls == unsupported.SCHEDULER
    if ours.aasd_learns_widths:
        ours.num_speculative_tokens_per_batch_size = _holding_none(
            ours.num_speculative_tokens_per_batch_size, args.max_num_seqs
        )
    prediction.install()
    target_parallel_config.worker_cls = unsupported.CPU_WORKER if current_platform.is_cpu() else unsupported.GPU_WORKER
    return ours


def _given_length(args: EngineArgs, vllm_keys: dict[str, Any]) -> int | None:
    """The `num_speculative_tokens` that was set, checked; None if it wasn't."""
    if args.spec_tokens is None and _LONGEST not in vllm_keys:
        return None
    given = vllm_keys[_LONGEST] if args.spec_tokens is None else args.spec_tokens
    if type(given) is not int or not 1 <= given <= MAX_SPECULATIVE_TOKENS:
        raise ValueError(
            f"{_LONGEST}={shown(given)} is not allowed: it takes an integer from 1 to {MAX_SPECULATIVE_TOKENS}."
        )
    return given


def _lengths(args: EngineArgs, settings: Settings, runner: str, given: int | None) -> dict[str, Any]:
    """vLLM's own keys that say how long drafts may be.

    Args:
        given: the `num_speculative_tokens` that was set, if it was.
    """
    if settings.draft_length != "adaptive":
        return {_LONGEST: given or settings.draft_length}
    if runner == "V1":
        return {_LONGEST: given or (NUM_SPECULATIVE_TOKENS if args.enable_lora else NUM_SPECULATIVE_TOKENS_V1)}
    if unsupported.is_synchronous(args):
        return {_LONGEST: given or NUM_SPECULATIVE_TOKENS}
    if args.data_parallel_size > 1:
        return {_LONGEST: given or NUM_SPECULATIVE_TOKENS_UNSCHEDULED}
    longest = given or NUM_SPECULATIVE_TOKENS
    return {_LONGEST: longest, _SCHEDULE: _vllm_schedule(longest)}


def _vllm_schedule(longest: int) -> list[tuple[int, int, int]]:
    """`DRAFT_SCHEDULE` as vLLM writes it: first and last number of requests, draft tokens, of which none has more than
    the first.
    """
    first = 1
    entries: list[tuple[int, int, int]] = []
    for last, length in DRAFT_SCHEDULE:
        entries.append((first, last, min(length, longest) if entries else longest))
        first = last + 1
    # vLLM goes on with the last entry.
    return [*entries, (first, first, 0)]


def _holding_none(schedule: list[tuple[int, int, int]], most: int | None) -> list[tuple[int, int, int]]:
    """The same schedule, but without drafts for the most requests, so that vLLM captures CUDA graphs for no drafts.

    It captures graphs for the lengths that it finds scheduled. The scheduler, which may choose to draft nothing for
    any number of requests, begins as if this weren't there (`vllm_aasd.engine.draft_length_schedule`).

    Args:
        schedule: ours; see `_vllm_schedule`.
        most: requests that a step may have; None for vLLM's default, which is beyond what drafts are scheduled for.
    """
    last_drafted = schedule[-1][0] - 1
    if most is None or not 2 <= most <= last_drafted:
        return schedule
    below = [(first, min(last, most - 1), length) for first, last, length in schedule if first < most]
    return [*below, (most, most, 0)]


def base_method(args: EngineArgs) -> str:
    """vLLM's method for the model runner that it will choose for these arguments.

    vLLM decides by its finished configuration (`VllmConfig.use_v2_model_runner`), of which the speculative one is a
    part, so this foresees it, by the same rules and switches; the worker refuses to start where the two disagree.
    """
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        if args.enable_dbo or args.ubatch_size > 1:
            return V1_BASE_METHOD
        if args.distributed_executor_backend == "external_launcher" and args.pipeline_parallel_size > 1:
            return V1_BASE_METHOD
    return V2_BASE_METHOD if chooses_v2() else V1_BASE_METHOD


def chooses_v2() -> bool:
    """Whether this machine and environment have vLLM choose its V2 model runner, whatever the arguments."""
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
