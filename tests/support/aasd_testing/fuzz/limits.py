"""What an engine under the fuzzer is given: small enough that prompts come in chunks and requests are preempted."""

from typing import Any, NamedTuple


class Limits(NamedTuple):
    """Sizes of an engine, and what it can do.

    Attributes:
        max_model_len: tokens of prompt and answer.
        max_prompt: of ordinary prompts, tokens.
        max_answer: of ordinary answers, tokens.
        engine: arguments of `vllm.LLM`, which are also those of ``vllm serve``.
        aasd: keys of the speculative config.
        features: what kinds of requests and events may need; see `kinds.Kind`.
        runner: ``V1`` or ``V2``.
    """

    max_model_len: int
    max_prompt: int
    max_answer: int
    engine: dict[str, Any]
    aasd: dict[str, Any]
    features: frozenset[str]
    runner: str


_LOOSEST = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_floor": 1e-4, "aasd_allow_request_override": "any"}
_EVENTS = {"faults", "clear_memory", "reset_prefix_cache"}
_ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "block_size": 32,
    "scheduling_policy": "priority",
    "per_request_spec_decode_metrics": "summary",
}

PROFILES = {
    # 8 requests want up to 64 blocks.
    "server": Limits(
        256,
        100,
        32,
        {**_ENGINE, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20},
        {**_LOOSEST, "num_speculative_tokens": 8, "aasd_memory": "process"},
        frozenset({"http", "top_k", "sleep", "reload_weights", "prompt_logprobs", *_EVENTS}),
        "V1",
    ),
    # Adapters switch the alignment of prompts off, so they have an engine of their own. vLLM 0.32's CPU build dies of
    # prompt log-probabilities beside them: it asks an adapted lm_head for more rows than it said there would be.
    "server-lora": Limits(
        256,
        100,
        32,
        # With adapters vLLM wants room for all drafts of a full batch.
        {**_ENGINE, "max_num_seqs": 7, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}
        | {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": 8},
        {**_LOOSEST, "num_speculative_tokens": 8, "aasd_memory": "process"},
        frozenset({"http", "top_k", "sleep", "lora", *_EVENTS}),
        "V1",
    ),
    "v1": Limits(
        256,
        60,
        16,
        {**_ENGINE, "max_num_seqs": 4, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 10},
        {**_LOOSEST, "num_speculative_tokens": 6, "aasd_memory": "process"},
        frozenset({"top_k", "prompt_logprobs", *_EVENTS}),
        "V1",
    ),
    # Interpreted kernels give about 11 tokens a second, and have no top-k.
    "v2": Limits(
        256,
        40,
        8,
        {**_ENGINE, "max_num_seqs": 3, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 9},
        {**_LOOSEST, "num_speculative_tokens": 4, "aasd_alignment": True},
        frozenset({"prompt_logprobs", *_EVENTS}),
        "V2",
    ),
}
"""By name; a case says for which it is."""
