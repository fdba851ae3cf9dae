"""What a worker finds out once, before it serves: the model's prior, and what its steps cost."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from vllm_aasd.alignment import entry_bytes
from vllm_aasd.config import Settings
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.step_time import knots
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.engine.unsupported import SCHEDULER
from vllm_aasd.kernels.align import align
from vllm_aasd.kernels.draft import Prior

logger = logging.getLogger("vllm.aasd")

MAX_ALIGNMENT_SHARE = 0.03
"""Of a prompt's time, what storing predictions at its positions may take for ``aasd_alignment: auto`` to do it."""

# Fixed numbers, not a time: with tensor parallelism every rank must take part in every step.
_REPETITIONS = 4
# Beyond this the curve is extrapolated linearly.
_MOST_TOKENS = 128


def max_draft_tokens(settings: Settings, num_speculative_tokens: int) -> int:
    """The longest draft of a request at any load."""
    if isinstance(settings.draft_length, str):
        return num_speculative_tokens
    return min(num_speculative_tokens, settings.draft_length)


def may_align_prompts(is_wanted: bool, has_lora: bool) -> bool:
    """Whether predictions may be stored at prompt positions; says in the log where they may not."""
    if is_wanted and has_lora:
        # lm_head maps adapters by sampler row, so prompt rows would get another request's adapter.
        logger.info("aasd: with LoRA, no predictions are stored at prompt positions")
        return False
    return is_wanted


def full_attention_group(kv_cache_config: KVCacheConfig) -> int | None:
    """The KV cache group whose blocks keep every token of a request, by its index."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    return None


def kv_cache_share(specs: Mapping[str, KVCacheSpec], top_k: int) -> float:
    """Of the memory for KV cache and alignment store, what the KV cache gets, in (0, 1].

    Args:
        specs: of each layer, as vLLM's runner gives them.
        top_k: predictions stored per slot.
    """
    kv_bytes = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
    if not any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
        return 1.0
    return kv_bytes / (kv_bytes + entry_bytes(top_k))


def load_prior(model: ModelConfig) -> Prior | None:
    """The prior of the served model, if one was made and is of use; says in the log which it is."""
    key = model_key(model.model, model.revision)
    path = prior_file.cache_path(key) if key else None
    try:
        if key is None or path is None:
            raise FileNotFoundError
        prior = prior_file.load(path, key, model.get_vocab_size())
    except FileNotFoundError:
        logger.info(
            "aasd: no prior for %s; `python -m vllm_aasd.prior %s` makes one, and drafts get better by it",
            model.model,
            model.model,
        )
        return None
    except TensorFileError as error:
        logger.warning("aasd: serving without a prior: %s", error)
        return None
    logger.info(
        "aasd: prior with %d successors per token and %d tokens of text, from %s",
        prior.ids.shape[1],
        np.count_nonzero(prior.texts >= 0),
        path,
    )
    return prior


class StepProfile(NamedTuple):
    """What steps cost.

    Attributes:
        samples: tokens in the batch and seconds, of steps whose every token is sampled from.
        alignment_share: of a prompt's time, what storing predictions at its positions takes.
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
        # It maps adapters for as many rows as there may be requests, but every row needs an entry.
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
            if repetition:  # the first of a size pays for what libraries set up
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
    """Bytes of earlier answers to keep, at most."""
    return 0 if settings.memory == "off" else int(settings.memory) << 20


def shares_text(vllm_config: VllmConfig) -> bool:
    """Whether our scheduler serves, which alone knows what requests may share text."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER
