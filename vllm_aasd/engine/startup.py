"""What a worker determines once, before it serves: its limits, and what its steps cost."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from vllm_aasd.alignment import entry_bytes
from vllm_aasd.config import Settings
from vllm_aasd.drafting.step_time import knots
from vllm_aasd.engine.unsupported import SCHEDULER
from vllm_aasd.kernels.align import align

logger = logging.getLogger("vllm.aasd")

_PREDICTION_MIB = 8
"""What is kept of predictions where no answers are."""

MAX_ALIGNMENT_SHARE = 0.03
"""The share of a prompt's time that storing predictions at its positions may take with ``aasd_alignment: auto``."""

# Fixed numbers, not a time: with tensor parallelism every rank must take part in every step.
_REPETITIONS = 4
# Beyond this the curve is extrapolated linearly.
_MOST_TOKENS = 128


def may_align_prompts(is_wanted: bool, has_lora: bool) -> bool:
    """Whether predictions may be stored at prompt positions; logs it if they are wanted and may not."""
    if is_wanted and has_lora:
        # lm_head maps adapters by sampler row, so prompt rows would get another request's adapter.
        logger.info("aasd: with LoRA, no predictions are stored at prompt positions")
        return False
    return is_wanted


def full_attention_group(kv_cache_config: KVCacheConfig) -> int | None:
    """The index of the KV cache group whose blocks keep every token of a request; None if there is none."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    return None


def kv_cache_share(specs: Mapping[str, KVCacheSpec], top_k: int) -> float:
    """The KV cache's share of the memory for KV cache and alignment store, in (0, 1].

    Args:
        specs: of each layer, as vLLM's runner gives them.
        top_k: predictions stored per slot.
    """
    kv_bytes = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
    if not any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
        return 1.0
    return kv_bytes / (kv_bytes + entry_bytes(top_k))


class StepProfile(NamedTuple):
    """What steps cost.

    Attributes:
        samples: tokens in the batch and seconds, of steps that sample from every token.
        alignment_share: the share of a prompt's time that storing predictions at its positions takes.
    """

    samples: list[tuple[int, float]]
    alignment_share: float


def dummy_forward(runner: Any, num_tokens: int) -> torch.Tensor:
    """Run the model on dummy tokens, so that logits of this many rows can be computed.

    Args:
        runner: vLLM's V1 model runner.
        num_tokens: the number of tokens.

    Returns:
        ``[>= num_tokens, hidden_size]``, hidden states.
    """
    hidden_states = runner._dummy_run(num_tokens)[0]
    if runner.lora_config is not None:
        # The runner maps adapters for at most as many rows as requests, but every row needs an entry.
        runner._set_active_loras((0,) * num_tokens, (0,) * num_tokens, set())
    return hidden_states


def profile_steps(
    forward: Callable[[int], torch.Tensor],
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    max_tokens: int,
    prompt_chunk: int,
    top_k: int,
) -> StepProfile:
    """Time steps of several sizes.

    Args:
        forward: runs the model on n tokens and returns hidden states, ``[>= n, hidden_size]``.
        compute_logits: from hidden states to logits.
        max_tokens: the most tokens of a step of decoding.
        prompt_chunk: prompt positions whose logits are computed at once.
        top_k: predictions stored per position.
    """
    samples = []
    for repetition in range(_REPETITIONS):
        for num_tokens in map(int, knots(min(max_tokens, _MOST_TOKENS))):
            forward_seconds, logits_seconds, _ = _time_step(forward, compute_logits, num_tokens)
            if repetition:  # the first includes what libraries set up
                samples.append((num_tokens, forward_seconds + logits_seconds))
    shares = []
    for _ in range(_REPETITIONS):
        forward_seconds, logits_seconds, logits = _time_step(forward, compute_logits, prompt_chunk)
        shares.append((logits_seconds + _time_align(logits, top_k)) / forward_seconds)
    return StepProfile(samples, min(shares))


def _time_step(
    forward: Callable[[int], torch.Tensor],
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    num_tokens: int,
) -> tuple[float, float, torch.Tensor]:
    began = time.perf_counter()
    hidden_states = forward(num_tokens)[:num_tokens]
    between = time.perf_counter()
    logits = compute_logits(hidden_states)
    return between - began, time.perf_counter() - between, logits


def _time_align(logits: torch.Tensor, top_k: int) -> float:
    rows = torch.arange(len(logits), device=logits.device)
    table = torch.empty(len(logits), 1 + 2 * top_k, dtype=torch.int32, device=logits.device)
    began = time.perf_counter()
    align(logits, rows.int(), rows, table)
    return time.perf_counter() - began


def memory_bytes(settings: Settings) -> int:
    """Bytes of earlier answers and predictions to keep, at most."""
    return _PREDICTION_MIB << 20 if settings.memory == "off" else int(settings.memory) << 20


def shares_text(vllm_config: VllmConfig) -> bool:
    """Whether our scheduler serves, which alone knows what requests may share text."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER
