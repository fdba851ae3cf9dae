"""What a worker determines once, before it serves: its limits, and what its steps cost."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, UniformTypeKVCacheSpecs

from vllm_aasd.alignment import entry_bytes
from vllm_aasd.config import Settings
from vllm_aasd.drafting.step_time import knots
from vllm_aasd.engine.unsupported import SCHEDULER

logger = logging.getLogger("vllm.aasd")

_PREDICTION_MIB = 8
"""What is kept of predictions where no answers are."""

PROFILE_SECONDS = 5.0
"""How long timing steps may delay the start."""

_REPETITIONS = 3
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
        if keeps_every_token(group.kv_cache_spec):
            return index
    return None


def keeps_every_token(spec: KVCacheSpec) -> bool:
    """Whether the blocks of a KV cache group keep every token of a request."""
    # Layers of several shapes, such as those of a target and its draft model, may share a group.
    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    return all(isinstance(one, FullAttentionSpec) for one in specs)


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
    agree: Callable[[bool], bool],
) -> list[tuple[int, float]]:
    """Time steps of several sizes, for about `PROFILE_SECONDS` at most: what isn't timed is learned while serving.

    Args:
        forward: runs the model on n tokens and returns hidden states, ``[>= n, hidden_size]``.
        compute_logits: from hidden states to logits.
        max_tokens: the most tokens of a step of decoding.
        agree: returns the first tensor-parallel rank's argument on every rank, all of which must run the same steps.

    Returns:
        Tokens in the batch and seconds of steps that sample from every token; at least one.
    """
    began = time.perf_counter()
    # Powers of two come first, since time may not suffice for more.
    sizes = sorted(map(int, knots(min(max_tokens, _MOST_TOKENS))), key=lambda size: (size.bit_count(), size))
    samples: list[tuple[int, float]] = []
    per_token = 0.0
    for num_tokens in sizes * _REPETITIONS:
        begun = time.perf_counter()
        # Larger steps take less time per token, so this is long enough.
        if samples and not agree(begun - began + per_token * num_tokens <= PROFILE_SECONDS):
            continue
        compute_logits(forward(num_tokens)[:num_tokens])
        samples.append((num_tokens, time.perf_counter() - begun))
        per_token = samples[-1][1] / num_tokens
    return samples


def warm_up_bytes(vllm_config: VllmConfig, vocab_size: int) -> int:
    """Bytes of logits that vLLM 0.32's own warm-up makes on the V2 model runner after it has sized the KV cache.

    It verifies the longest draft of as many requests as fit a step; a part of the rows, at most 1 GiB, also in float32.
    """
    scheduler = vllm_config.scheduler_config
    rows_of_request = vllm_config.num_speculative_tokens + 1
    num_reqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens // (rows_of_request + 1))
    num_logits = num_reqs * rows_of_request * vocab_size
    return num_logits * vllm_config.model_config.dtype.itemsize + min(4 * num_logits, 1 << 30)


def memory_bytes(settings: Settings) -> int:
    """Bytes of earlier answers and predictions to keep, at most."""
    return _PREDICTION_MIB << 20 if settings.memory == "off" else int(settings.memory) << 20


def shares_text(vllm_config: VllmConfig) -> bool:
    """Whether our scheduler serves, which alone knows what requests may share text."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER
