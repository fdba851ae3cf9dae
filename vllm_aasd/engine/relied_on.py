"""All of vLLM that we hold on to, by model runner, and the check of it: the doctor's, and that of a starting worker.

What is replaced is in `seams`; here stand too the methods that we extend or implement and the names that we read.
A check imports a runner, which is heavy: not for vLLM's API server.
"""

import importlib
import inspect
from typing import NamedTuple

from vllm_aasd.engine import patching
from vllm_aasd.engine.patching import Seam, SeamError


class Members(NamedTuple):
    """Names that we read from objects of a class of vLLM.

    Attributes:
        module: where the class is.
        attribute: its name.
        names: fields, methods, or what its code assigns on ``self``.
    """

    module: str
    attribute: str
    names: tuple[str, ...]


_WORKER = "vllm.v1.worker.gpu_worker"
_V1, _V2 = "vllm.v1.worker", "vllm.v1.worker.gpu"

BOTH: tuple[Seam | Members, ...] = (
    patching.CREATE_SPECULATIVE_CONFIG,
    patching.VERIFY_SAMPLING_PARAMS,
    Seam(_WORKER, "Worker.init_device", ("self",)),
    Seam(_WORKER, "Worker.load_model", ("self",)),
    Seam(_WORKER, "Worker.determine_available_memory", ("self",)),
    Seam(_WORKER, "Worker.initialize_from_config", ("self", "kv_cache_config")),
    Seam(_WORKER, "Worker.compile_or_warm_up_model", ("self",)),
    Seam(_WORKER, "Worker.execute_model", ("self", "scheduler_output")),
    Seam(_WORKER, "Worker.sample_tokens", ("self", "grammar_output")),
    Seam(_WORKER, "Worker.take_draft_token_ids", ("self",)),
    Seam(_WORKER, "Worker.shutdown", ("self",)),
    Members(_WORKER, "Worker", ("use_v2_model_runner", "get_kv_cache_spec", "model_runner")),
    Members("vllm.v1.outputs", "DraftTokenIds", ("req_ids", "draft_token_ids")),
    Members("vllm.v1.kv_cache_interface", "KVCacheConfig", ("num_blocks", "kv_cache_groups")),
    Members("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", ("kv_cache_spec", "layer_names")),
    Members("vllm.v1.kv_cache_interface", "FullAttentionSpec", ("block_size", "page_size_bytes")),
    Members(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        (
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
        ),
    ),
    Members(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        ("prompt_token_ids", "mm_features", "block_ids", "num_computed_tokens"),
    ),
    Members(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        ("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
    ),
    Members("vllm.multimodal.inputs", "MultiModalFeatureSpec", ("mm_position",)),
    Members("vllm.multimodal.inputs", "PlaceholderRange", ("extract_embeds_range",)),
    Members(
        "vllm.sampling_params",
        "SamplingParams",
        (
            "all_stop_token_ids",
            "extra_args",
            "max_tokens",
            "num_logprobs",
            "sampling_type",
            "structured_outputs",
            "temperature",
            "logprob_token_ids",
            "min_tokens",
            "thinking_token_budget",
        ),
    ),
    Members("vllm.engine.arg_utils", "EngineArgs", ("disable_log_stats", "scheduler_cls")),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("self",)),
    Members("vllm.v1.core.sched.scheduler", "Scheduler", ("dynamic_sd_lookup", "max_num_scheduled_tokens")),
    Seam("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", ()),
    Members("vllm.v1.outputs", "ModelRunnerOutput", ("req_id_to_index", "sampled_token_ids")),
    Members("vllm.config", "ModelConfig", ("served_model_name",)),
    Members("vllm.config", "ParallelConfig", ("data_parallel_index",)),
    Members("vllm.v1.metrics.reader", "Counter", ("name", "labels", "value")),
    Members(
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        ("world_size", "rank_in_group", "cpu_group", "broadcast_object"),
    ),
)

V1: tuple[Seam | Members, ...] = (
    patching.REJECTION_SAMPLE,
    patching.REJECTION_SAMPLER_FORWARD,
    patching.EXPAND_BATCH_TO_TOKENS,
    patching.APPLY_SAMPLING_CONSTRAINTS,
    patching.GATHER_CHOSEN_LOGPROBS,
    Seam("vllm.v1.sample.sampler", "Sampler.forward", ("self", "logits", "sampling_metadata", "predict_bonus_token")),
    Seam("vllm.v1.sample.sampler", "Sampler.compute_logprobs", ("logits",)),
    Seam(
        "vllm.v1.sample.thinking_budget_state",
        "ThinkingBudgetStateHolder.apply_to_logits",
        ("self", "logits", "predict_bonus_token", "spec_token_ids"),
    ),
    Members(
        "vllm.v1.sample.thinking_budget_state",
        "ThinkingBudgetStateHolder",
        ("in_spec_mode", "has_tracked_requests", "update_state"),
    ),
    Members("vllm.v1.sample.rejection_sampler", "RejectionSampler", ("sampler", "is_logits_logprobs_mode")),
    Members("vllm.v1.outputs", "LogprobsTensors", ("logprob_token_ids", "logprobs", "selected_token_ranks")),
    Seam("vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", ("vllm_config",)),
    Seam(
        "vllm.v1.sample.rejection_sampler",
        "generate_uniform_probs",
        ("num_tokens", "num_draft_tokens", "generators", "device"),
    ),
    Members(
        f"{_V1}.gpu_model_runner",
        "GPUModelRunner",
        (
            "drafter",
            "execute_model_state",
            "input_batch",
            "input_ids",
            "requests",
            "discard_request_mask",
            "_dummy_run",
        ),
    ),
    Members(f"{_V1}.gpu_input_batch", "InputBatch", ("req_ids", "block_table", "generators", "req_prompt_embeds")),
    Seam(
        f"{_V1}.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
    ),
    Members(
        f"{_V1}.gpu_model_runner",
        "ExecuteModelState",
        ("scheduler_output", "logits", "spec_decode_metadata", "hidden_states"),
    ),
    Members(
        "vllm.v1.spec_decode.metadata",
        "SpecDecodeMetadata",
        (
            "logits_indices",
            "num_draft_tokens",
            "draft_token_ids",
            "max_spec_len",
            "cu_num_draft_tokens",
            "target_logits_indices",
            "bonus_logits_indices",
        ),
    ),
    Members("vllm.v1.core.sched.output", "SchedulerOutput", ("has_structured_output_requests",)),
    Members(
        "vllm.v1.sample.metadata",
        "SamplingMetadata",
        (
            "all_greedy",
            "temperature",
            "generators",
            "max_num_logprobs",
            "logprob_token_ids",
            "no_penalties",
            "allowed_token_ids_mask",
            "bad_words_token_ids",
            "logitsprocs",
            "thinking_budget_state_holder",
        ),
    ),
    Members("vllm.v1.sample.logits_processor", "MinTokensLogitsProcessor", ("min_toks",)),
    Members("vllm.v1.outputs", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Members(f"{_V1}.block_table", "BlockTable", ("block_table", "slot_mapping", "block_size")),
)

V2: tuple[Seam | Members, ...] = (
    patching.V2_INIT_SPECULATOR,
    patching.V2_REJECTION_SAMPLE,
    patching.V2_GET_LOGPROBS,
    patching.V2_COMPUTE_LOGPROBS,
    Seam(f"{_V2}.sample.logprob", "LogprobTokenIdsState.max_num_token_ids", ("self", "idx_mapping_np")),
    Seam(
        f"{_V2}.spec_decode.speculator",
        "BaseSpeculator.propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
        ),
    ),
    Seam(f"{_V2}.spec_decode.speculator", "BaseSpeculator.init_cudagraph_manager", ("self", "cudagraph_mode")),
    Seam(f"{_V2}.spec_decode.speculator", "BaseSpeculator.capture", ("self",)),
    Seam(
        f"{_V2}.sample.logits_processor.interface",
        "LogitsProcessor.add_request",
        ("self", "req_idx", "sampling_params"),
    ),
    Seam(f"{_V2}.sample.logits_processor.interface", "LogitsProcessor.apply_staged_writes", ("self",)),
    Seam(f"{_V2}.sample.logits_processor.interface", "LogitsProcessor.apply", ("self", "logits", "ctx")),
    Seam(
        "vllm.model_executor.layers.logits_processor",
        "LogitsProcessor.forward",
        ("self", "lm_head", "hidden_states", "embedding_bias", "skip_gather"),
    ),
    Members(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        ("shard_indices", "num_added_embeddings", "org_vocab_size", "num_embeddings_per_partition"),
    ),
    Members(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbeddingShardIndices",
        ("num_org_elements", "org_vocab_start_index"),
    ),
    Seam("vllm.distributed.parallel_state", "GroupCoordinator.all_gather", ("self", "input_", "dim")),
    Members(
        f"{_V2}.model_runner",
        "GPUModelRunner",
        ("speculator", "sampler", "model", "get_model", "block_tables", "execute_model_state"),
    ),
    Members(
        f"{_V2}.model_runner",
        "ExecuteModelState",
        ("input_batch", "slot_mappings_by_layer", "hidden_states"),
    ),
    Members(
        f"{_V2}.input_batch",
        "InputBatch",
        (
            "num_reqs",
            "idx_mapping",
            "idx_mapping_np",
            "input_ids",
            "logits_indices",
            "query_start_loc_np",
            "is_prefilling_np",
        ),
    ),
    Members(
        f"{_V2}.states",
        "RequestState",
        ("all_token_ids", "total_len", "max_seq_len", "max_num_reqs", "index_to_req_id"),
    ),
    Members(f"{_V2}.block_table", "BlockTables", ("block_tables", "block_sizes")),
    Members(f"{_V2}.sample.sampler", "Sampler", ("logits_processors", "sampling_states", "logprob_token_ids_state")),
    Members(f"{_V2}.sample.states", "SamplingStates", ("temperature",)),
    Members(f"{_V2}.buffer_utils", "UvaBackedTensor", ("np", "gpu", "copy_to_uva")),
)

RUNNERS = {"V1": V1, "V2": V2}


def problems(needed: tuple[Seam | Members, ...]) -> list[str]:
    """What of vLLM isn't as we know it, a sentence each; empty if all is well."""
    found = []
    for one in needed:
        try:
            patching.check(one) if isinstance(one, Seam) else _check_members(one)
        except SeamError as error:
            found.append(str(error))
    return found


def check(runner: str) -> None:
    """Refuse a vLLM on which a model runner's adapter can't work.

    Args:
        runner: ``V1`` or ``V2``.

    Raises:
        SeamError: naming everything that isn't as we know it.
    """
    found = problems(BOTH + RUNNERS[runner])
    if found:
        raise SeamError(
            f"method 'aasd' can't work on vLLM {patching.vllm_version()} ({runner} model runner): " + "; ".join(found)
        )


def _check_members(members: Members) -> None:
    where = f"{members.module}.{members.attribute}"
    try:
        owner = getattr(importlib.import_module(members.module), members.attribute)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"vLLM has no {where} any more ({error})") from error
    names = {name for cls in owner.__mro__ for name in (*vars(cls), *vars(cls).get("__annotations__", {}))}
    missing = [name for name in members.names if name not in names]
    if missing:
        # Most of what a runner holds is only ever assigned.
        source = "\n".join(inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__.startswith("vllm."))
        missing = [name for name in missing if f"self.{name} " not in source and f"self.{name}:" not in source]
    if missing:
        raise SeamError(f"{where} of vLLM has no {', '.join(missing)} any more")
