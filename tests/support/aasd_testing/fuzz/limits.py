"""What an engine under the fuzzer is given: small enough that prompts come in chunks and requests are preempted."""

from typing import Any, NamedTuple

MAX_MODEL_LEN = 256

THINK_START, THINK_END = "<file_sep>", "<reponame>"
"""Single tokens of the demo model that it doesn't emit of its own accord."""


class Limits(NamedTuple):
    """Sizes of an engine, and what it can do.

    Attributes:
        max_prompt: of ordinary prompts, tokens; `max_answer` is of ordinary answers.
        engine: arguments of ``vllm serve``; `aasd` are keys of the speculative config.
        features: what kinds of requests and events may need; see `kinds.Kind`.
        runner: ``V1`` or ``V2``.
    """

    max_prompt: int
    max_answer: int
    engine: dict[str, Any]
    aasd: dict[str, Any]
    features: frozenset[str]
    runner: str


_LOOSEST = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_allow_request_override": "any"}
_COMMON = {"faults", "clear_memory", "reset_prefix_cache", "thinking"}
_ENGINE = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 32,
    "scheduling_policy": "priority",
    "per_request_spec_decode_metrics": "summary",
    "reasoning_config": {"reasoning_start_str": THINK_START, "reasoning_end_str": THINK_END},
}

PROFILES = {
    # 8 requests want up to 64 blocks. Drafts of 16 hand a streamed tool call on in pieces of up to 17 tokens.
    "server": Limits(
        100,
        32,
        {**_ENGINE, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}
        | {"enable_prompt_embeds": True},
        {**_LOOSEST, "num_speculative_tokens": 16},
        frozenset({"embeds", "top_k", "sleep", "reload_weights", "prompt_logprobs", *_COMMON}),
        "V1",
    ),
    # Adapters switch the alignment of prompts off, so they have an engine of their own. vLLM 0.32's CPU build dies of
    # prompt log-probabilities beside them: it asks an adapted lm_head for more rows than it said there would be.
    "server-lora": Limits(
        100,
        32,
        # With adapters vLLM wants room for all drafts of a full batch.
        {**_ENGINE, "max_num_seqs": 7, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}
        | {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": 8},
        {**_LOOSEST, "num_speculative_tokens": 8},
        frozenset({"top_k", "sleep", "lora", *_COMMON}),
        "V1",
    ),
    # Without memory, by which a request is drafted for from the text of others; and as much is drafted as can be.
    "v1": Limits(
        60,
        16,
        {**_ENGINE, "max_num_seqs": 4, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 10}
        | {"enable_prompt_embeds": True},
        {**_LOOSEST, "num_speculative_tokens": 6, "aasd_draft_length": 6, "aasd_alignment": True},
        frozenset({"embeds", "top_k", "sleep", "prompt_logprobs", *_COMMON}),
        "V1",
    ),
    # Interpreted kernels give about 11 tokens a second, and have no top-k.
    "v2": Limits(
        40,
        8,
        {**_ENGINE, "max_num_seqs": 3, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 9}
        | {"enable_prompt_embeds": True},
        {**_LOOSEST, "num_speculative_tokens": 4, "aasd_alignment": True},
        frozenset({"embeds", "prompt_logprobs", *_COMMON}),
        "V2",
    ),
}
"""By name; a case says for which it is."""
