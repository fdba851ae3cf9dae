"""The configurations that are refused, by model runner. The doctor prints this table."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_aasd.config import PREFIX, Settings, shown

CPU_WORKER = "vllm_aasd.engine.cpu_worker.AASDCPUWorker"
GPU_WORKER = "vllm_aasd.engine.gpu_worker.AASDGPUWorker"
SCHEDULER = "vllm_aasd.engine.scheduler.AASDScheduler"


DRAFT_MODEL_METHOD = "draft_model"
"""vLLM's method that runs a draft model."""

DRAFT_MODEL_KEYS = ("model", "revision", "code_revision", "quantization", "max_model_len")
"""vLLM's keys of the speculative config that say which draft model, and how it is loaded."""


class Refusal(NamedTuple):
    """A setting, and the only values that aasd works with.

    Attributes:
        name: of one of our settings, a key of the speculative config, or an argument of the engine.
        allowed: the allowed values.
        reason: why no other is.
        in_json: whether it is a key of the speculative config.
        holds: whether the refusal applies, given the engine's other arguments.
    """

    name: str
    allowed: tuple[Any, ...]
    reason: str
    in_json: bool = False
    holds: Callable[[EngineArgs], bool] = lambda args: True


def is_synchronous(args: EngineArgs) -> bool:
    """Whether vLLM waits for a step's tokens before it schedules the next."""
    # vLLM schedules asynchronously by default, except on its CPU platform, which always turns it off.
    return args.async_scheduling is False or current_platform.is_cpu()


def _adapts_lm_head(args: EngineArgs) -> bool:
    # As vLLM decides which layers to wrap.
    return args.lora_target_modules is None or any("lm_head" in name for name in args.lora_target_modules)


def _has_draft_model(args: EngineArgs) -> bool:
    return (args.speculative_config or {}).get("model") is not None


_BOTH = (
    Refusal("worker_cls", ("auto", CPU_WORKER, GPU_WORKER), "it has its own worker; allowed is 'auto'"),
    Refusal(
        "rejection_sample_method",
        (None, "standard"),
        "it replaces the rejection sampler; allowed is 'standard'",
        in_json=True,
    ),
    Refusal(
        "draft_sample_method",
        (None, "greedy"),
        "its drafts are the likeliest tokens; allowed is 'greedy'",
        in_json=True,
    ),
    Refusal(
        "enable_adaptive_verification",
        (None, False),
        "it is for draft models, and aasd adapts the draft length itself; allowed is false",
        in_json=True,
    ),
    Refusal("spec_model", (None,), 'it takes a draft model as "model" of --speculative-config; leave it out'),
    Refusal("kv_sharing_fast_prefill", (False,), "prompt hidden states are wrong in that mode; allowed is false"),
    Refusal("decode_context_parallel_size", (1,), "the KV slots of a request must lie on one rank; allowed is 1"),
    Refusal("prefill_context_parallel_size", (1,), "the KV slots of a request must lie on one rank; allowed is 1"),
)
BY_RUNNER = {
    "V1": (
        *_BOTH,
        Refusal(
            "pipeline_parallel_size",
            (1,),
            "there is no speculation across pipeline stages on vLLM's V1 model runner; allowed is 1",
        ),
        Refusal(
            "async_scheduling",
            (None, False),
            "drafts are made on the host between two steps on vLLM's V1 model runner; leave it out",
        ),
        Refusal(
            "num_speculative_tokens_per_batch_size",
            (None,),
            "drafts adapt to the load on vLLM's V1 model runner; leave it out",
            in_json=True,
        ),
        *(
            Refusal(name, allowed, f"with a draft model, {reason}", holds=_has_draft_model)
            for name, allowed, reason in (
                ("tensor_parallel_size", (1,), "ranks would have to run it in the same steps; allowed is 1"),
                ("data_parallel_size", (1,), "ranks would have to run it in the same steps; allowed is 1"),
                ("enable_lora", (False, None), "no adapter applies to it; allowed is false"),
                ("kv_transfer_config", (None,), "its part of the KV cache isn't transferred; leave it out"),
            )
        ),
    ),
    "V2": (
        *_BOTH,
        Refusal(
            "model",
            (None,),
            "a draft model is run on vLLM's V1 model runner only, which serves CPUs; leave it out",
            in_json=True,
        ),
        Refusal(
            "enable_lora",
            # `vllm serve` has None where its option isn't given.
            (False, None),
            "vLLM 0.32's V2 model runner maps adapters in lm_head to one row of logits per request, and drafts have "
            "more; allowed is false, or lora_target_modules without 'lm_head'",
            holds=_adapts_lm_head,
        ),
        Refusal(
            "pipeline_parallel_size",
            (1,),
            "with synchronous scheduling, as on CPUs, vLLM 0.32's V2 model runner fails with any speculative method; "
            "allowed is 1, or asynchronous scheduling",
            holds=is_synchronous,
        ),
    ),
}


_VLLM_KEYS = {"method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size"} | {
    refusal.name for refusal in _BOTH if refusal.in_json
}
"""vLLM's own keys of the speculative config that say something about aasd, or have a reason of their own above."""


def refuse(name: str, value: Any, reason: str) -> None:
    """Raise the ValueError that names a setting, its value and what is allowed."""
    raise ValueError(f"method 'aasd' can't work with {name}={shown(value)}: {reason}.")


def check(runner: str, args: EngineArgs, vllm_keys: dict[str, Any], settings: Settings) -> None:
    """Refuse what can't work.

    Args:
        runner: ``V1`` or ``V2``.
        args: the engine's arguments.
        vllm_keys: vLLM's own keys of the speculative config.
        settings: ours.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    for refusal in BY_RUNNER[runner]:
        if refusal.name.startswith(PREFIX):
            value = getattr(settings, refusal.name.removeprefix(PREFIX))
        elif refusal.in_json:
            value = vllm_keys.get(refusal.name)
        else:
            value = getattr(args, refusal.name)
        if value not in refusal.allowed and refusal.holds(args):
            refuse(refusal.name, value, refusal.reason)
    # vLLM itself refuses keys that it doesn't know.
    foreign = {field.name for field in dataclasses.fields(SpeculativeConfig)} - _VLLM_KEYS
    if vllm_keys.get("model") is not None:
        foreign -= set(DRAFT_MODEL_KEYS)
    for key, value in vllm_keys.items():
        if key in foreign:
            refuse(key, value, "it belongs to another speculative method or to a draft model; leave it out")


def check_model(model: ModelConfig) -> None:
    """Refuse a model that doesn't generate one token after the other.

    Args:
        model: the target model's finished configuration.

    Raises:
        ValueError: naming what of the configuration says so.
    """
    if model.runner_type == "pooling":
        refuse(
            "runner",
            "pooling",
            "it embeds, classifies or scores and generates no tokens; leave out --speculative-config",
        )
    if model.is_encoder_decoder:
        refuse("is_encoder_decoder", True, "it is for decoder-only models; leave out --speculative-config")
    if model.is_diffusion:
        refuse("is_diffusion", True, "its tokens don't come one after the other; leave out --speculative-config")


def check_target_of_draft_model(model: ModelConfig) -> None:
    """Refuse a target that a draft model can't read all the input of.

    Args:
        model: the target model's finished configuration.

    Raises:
        ValueError: naming the draft model's key.
    """
    if model.is_multimodal_model:
        refuse("model", "a draft model", "the target takes more than text; leave it out")


def check_draft_model(config: SpeculativeConfig | None) -> None:
    """Refuse a drafter that isn't a model of its own.

    Args:
        config: what vLLM has made of the draft model's keys; None if there are none.

    Raises:
        ValueError: naming the draft model, and vLLM's method for it.
    """
    if config is not None and config.method != DRAFT_MODEL_METHOD:
        refuse(
            "model",
            config.model,
            f"for vLLM it is a drafter of method '{config.method}'; allowed is a model of its own, which vLLM runs "
            f"by method '{DRAFT_MODEL_METHOD}'",
        )
