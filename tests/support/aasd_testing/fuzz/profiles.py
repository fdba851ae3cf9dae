"""The servers that are fuzzed: small enough that prompts come in chunks and requests are preempted."""

import pathlib
from typing import Any, NamedTuple

MAX_MODEL_LEN = 256

THINK_START, THINK_END = "<file_sep>", "<reponame>"
"""Single tokens that the demo model doesn't emit on its own."""

ADAPTERS = ("adapter-1", "adapter-2")

_ROOT = pathlib.Path(__file__).parents[4]
CORPORA = {"readme": str(_ROOT / "README.md"), "guide": str(_ROOT / "docs" / "verification.md")}
"""Paths by name; either text may stand under either name later."""
FLEETING = "fleeting"
"""A corpus that is there at times."""


class Profile(NamedTuple):
    """A server's configuration, and what it can be asked.

    Attributes:
        runner: ``V1`` or ``V2``.
        max_prompt: tokens of ordinary prompts; `max_answer` is for ordinary answers.
        engine: arguments of ``vllm serve``; `aasd` holds keys of the speculative config.
        features: what some request types and events need.
    """

    runner: str
    max_prompt: int
    max_answer: int
    engine: dict[str, Any]
    aasd: dict[str, Any]
    features: frozenset[str]


_SETTINGS = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_allow_request_override": "any", "aasd_corpora": CORPORA}
_ENGINE = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 32,
    "scheduling_policy": "priority",
    "reasoning_config": {"reasoning_start_str": THINK_START, "reasoning_end_str": THINK_END},
}

PROFILES = {
    # 8 requests need up to 64 blocks. With drafts of 16, a streamed tool call comes in pieces of up to 17 tokens.
    "v1": Profile(
        "V1",
        100,
        32,
        {**_ENGINE, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}
        | {"enable_prompt_embeds": True, "per_request_spec_decode_metrics": "summary"}
        # In the other profiles, the scheduler and the worker are in one process, where the hooks reach both.
        | {"distributed_executor_backend": "mp"},
        {**_SETTINGS, "num_speculative_tokens": 16, "aasd_alignment": True},
        frozenset({"embeds", "top_k", "sleep", "prompt_logprobs", "many_allowed_ids"}),
    ),
    # Every request has an adapter: with requests that have none beside it, vLLM 0.32's CPU build applies it to them,
    # too (https://github.com/vllm-project/vllm/pull/48421). It also crashes on prompt log-probabilities.
    "lora": Profile(
        "V1",
        100,
        32,
        # With adapters, vLLM wants room for all drafts of a full batch.
        {**_ENGINE, "max_num_seqs": 7, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}
        | {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": 8},
        {**_SETTINGS, "num_speculative_tokens": 8, "aasd_draft_length": 8},
        frozenset({"top_k", "sleep", "lora", "many_allowed_ids"}),
    ),
    # The model drafts for itself.
    "draft_model": Profile(
        "V1",
        100,
        32,
        {**_ENGINE, "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20},
        {**_SETTINGS, "num_speculative_tokens": 8},
        frozenset({"top_k", "sleep", "draft_model", "many_allowed_ids"}),
    ),
    # Interpreted kernels emit about 11 tokens a second, and have no top-k. vLLM 0.32's V2 model runner dies of
    # more than 1024 `allowed_token_ids`.
    "v2": Profile(
        "V2",
        40,
        8,
        {**_ENGINE, "max_num_seqs": 3, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 9}
        | {"enable_prompt_embeds": True},
        {**_SETTINGS, "num_speculative_tokens": 4, "aasd_alignment": True},
        frozenset({"embeds", "prompt_logprobs"}),
    ),
}
