"""What we use of vLLM besides its plugin interface, by model runner. The doctor and each starting worker check it.

A check imports the model runner, which is slow, so vLLM's API server doesn't run it.
"""

import importlib
import inspect
from typing import NamedTuple

from vllm_aasd.engine import patching
from vllm_aasd.engine.patching import PatchTarget, UnsupportedVLLMError


class Members(NamedTuple):
    """A class of vLLM, and the fields and methods of its objects that we use."""

    module: str
    attribute: str
    names: tuple[str, ...]


class Abstract(Members):
    """An abstract class of vLLM that we implement, and the methods that we define."""


Requirement = PatchTarget | Members


def _table(
    targets: tuple[PatchTarget, ...], methods: dict[str, str], members: dict[str, str], abstract: dict[str, str]
) -> tuple[Requirement, ...]:
    """Keys are ``module:attribute``; values list first parameters, members or methods."""
    rows: list[Requirement] = list(targets)
    for kind, table in ((PatchTarget, methods), (Members, members), (Abstract, abstract)):
        for where, names in table.items():
            module, attribute = where.split(":")
            rows.append(kind(module, attribute, tuple(names.split())))
    return tuple(rows)


BOTH = _table(
    (patching.CREATE_SPECULATIVE_CONFIG, patching.VERIFY_SAMPLING_PARAMS, patching.MULTIPROCESS_COLLECT),
    {
        "vllm.v1.worker.gpu_worker:Worker.init_device": "self",
        "vllm.v1.worker.gpu_worker:Worker.load_model": "self",
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "self",
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": "self kv_cache_config",
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "self",
        "vllm.v1.worker.gpu_worker:Worker.execute_model": "self scheduler_output",
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens": "self grammar_output",
        "vllm.v1.worker.gpu_worker:Worker.take_draft_token_ids": "self",
        "vllm.v1.worker.gpu_worker:Worker.shutdown": "self",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "self scheduler_output model_runner_output",
        "vllm.v1.core.sched.scheduler:Scheduler.schedule": "self",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler": "",
    },
    {
        "vllm.v1.worker.gpu_worker:Worker": "use_v2_model_runner get_kv_cache_spec model_runner",
        "vllm.v1.outputs:DraftTokenIds": "req_ids draft_token_ids",
        "vllm.v1.kv_cache_interface:KVCacheConfig": "num_blocks kv_cache_groups",
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
        "vllm.v1.kv_cache_interface:FullAttentionSpec": "block_size page_size_bytes",
        "vllm.v1.core.sched.output:SchedulerOutput": (
            "scheduled_new_reqs scheduled_cached_reqs finished_req_ids num_scheduled_tokens "
            "scheduled_spec_decode_tokens"
        ),
        "vllm.v1.core.sched.output:NewRequestData": "prompt_token_ids mm_features block_ids num_computed_tokens",
        "vllm.v1.core.sched.output:CachedRequestData": "req_ids resumed_req_ids new_block_ids num_computed_tokens",
        "vllm.multimodal.inputs:MultiModalFeatureSpec": "mm_position",
        "vllm.multimodal.inputs:PlaceholderRange": "extract_embeds_range",
        "vllm.sampling_params:SamplingParams": (
            "all_stop_token_ids extra_args max_tokens num_logprobs sampling_type structured_outputs temperature "
            "logprob_token_ids min_tokens thinking_token_budget"
        ),
        "vllm.engine.arg_utils:EngineArgs": "disable_log_stats scheduler_cls",
        "vllm.v1.core.sched.scheduler:Scheduler": "dynamic_sd_lookup max_num_scheduled_tokens",
        "vllm.v1.outputs:ModelRunnerOutput": "req_id_to_index sampled_token_ids",
        "vllm.config:ModelConfig": "served_model_name",
        "vllm.config:ParallelConfig": "data_parallel_index",
        "vllm.v1.metrics.reader:Counter": "name labels value",
        "vllm.distributed.parallel_state:GroupCoordinator": "world_size rank_in_group cpu_group broadcast_object",
    },
    {},
)
V1 = _table(
    (
        patching.REJECTION_SAMPLE,
        patching.REJECTION_SAMPLER_FORWARD,
        patching.EXPAND_BATCH_TO_TOKENS,
        patching.APPLY_SAMPLING_CONSTRAINTS,
        patching.GATHER_CHOSEN_LOGPROBS,
    ),
    {
        "vllm.v1.sample.sampler:Sampler.forward": "self logits sampling_metadata predict_bonus_token",
        "vllm.v1.sample.sampler:Sampler.compute_logprobs": "logits",
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits": (
            "self logits predict_bonus_token spec_token_ids"
        ),
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": "vllm_config",
        "vllm.v1.sample.rejection_sampler:generate_uniform_probs": "num_tokens num_draft_tokens generators device",
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras": (
            "self prompt_lora_mapping token_lora_mapping lora_requests"
        ),
    },
    {
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": (
            "_state in_spec_mode has_tracked_requests update_state"
        ),
        "vllm.v1.sample.rejection_sampler:RejectionSampler": "sampler is_logits_logprobs_mode",
        "vllm.v1.outputs:LogprobsTensors": "logprob_token_ids logprobs selected_token_ranks",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
            "drafter execute_model_state input_batch input_ids requests discard_request_mask _dummy_run"
        ),
        "vllm.v1.worker.gpu_input_batch:InputBatch": "req_ids block_table generators req_prompt_embeds",
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState": (
            "scheduler_output logits spec_decode_metadata hidden_states"
        ),
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": (
            "logits_indices num_draft_tokens draft_token_ids max_spec_len cu_num_draft_tokens target_logits_indices "
            "bonus_logits_indices"
        ),
        "vllm.v1.core.sched.output:SchedulerOutput": "has_structured_output_requests",
        "vllm.v1.sample.metadata:SamplingMetadata": (
            "all_greedy temperature generators max_num_logprobs logprob_token_ids no_penalties allowed_token_ids_mask "
            "bad_words_token_ids logitsprocs thinking_budget_state_holder"
        ),
        "vllm.v1.sample.logits_processor:MinTokensLogitsProcessor": "min_toks",
        "vllm.v1.outputs:SamplerOutput": "sampled_token_ids logprobs_tensors",
        "vllm.v1.worker.block_table:BlockTable": "block_table slot_mapping block_size",
    },
    {},
)
V2 = _table(
    (patching.V2_INIT_SPECULATOR, patching.V2_REJECTION_SAMPLE, patching.V2_GET_LOGPROBS, patching.V2_COMPUTE_LOGPROBS),
    {
        "vllm.v1.worker.gpu.sample.logprob:LogprobTokenIdsState.max_num_token_ids": "self idx_mapping_np",
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose": (
            "self input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled "
            "num_rejected last_sampled next_prefill_tokens temperature seeds"
        ),
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager": "self cudagraph_mode",
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture": "self",
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.add_request": (
            "self req_idx sampling_params"
        ),
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply_staged_writes": "self",
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply": "self logits ctx",
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward": (
            "self lm_head hidden_states embedding_bias skip_gather"
        ),
        "vllm.distributed.parallel_state:GroupCoordinator.all_gather": "self input_ dim",
    },
    {
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": (
            "shard_indices num_added_embeddings org_vocab_size num_embeddings_per_partition"
        ),
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
            "num_org_elements org_vocab_start_index"
        ),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
            "speculator sampler model get_model block_tables execute_model_state"
        ),
        "vllm.v1.worker.gpu.model_runner:ExecuteModelState": "input_batch slot_mappings_by_layer hidden_states",
        "vllm.v1.worker.gpu.input_batch:InputBatch": (
            "num_reqs idx_mapping idx_mapping_np input_ids logits_indices query_start_loc_np is_prefilling_np"
        ),
        "vllm.v1.worker.gpu.states:RequestState": "all_token_ids total_len max_seq_len max_num_reqs index_to_req_id",
        "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables block_sizes",
        "vllm.v1.worker.gpu.sample.sampler:Sampler": "logits_processors sampling_states logprob_token_ids_state",
        "vllm.v1.worker.gpu.sample.states:SamplingStates": "temperature",
        "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": "np gpu copy_to_uva",
        "vllm.v1.worker.gpu.buffer_utils:UvaBufferPool": "copy_to_gpu",
    },
    {
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": "init_cudagraph_manager capture propose",
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor": "add_request apply_staged_writes apply",
    },
)

RUNNERS = {"V1": V1, "V2": V2}


def problems(needed: tuple[Requirement, ...]) -> list[str]:
    """How the installed vLLM differs from what we need, one sentence each; empty if it doesn't."""
    found = []
    for one in needed:
        try:
            patching.check(one) if isinstance(one, PatchTarget) else _check_class(one)
        except UnsupportedVLLMError as error:
            found.append(str(error))
    return found


def check(runner: str) -> None:
    """Refuse a vLLM on which a model runner's adapter can't work.

    Args:
        runner: ``V1`` or ``V2``.

    Raises:
        UnsupportedVLLMError: naming every difference.
    """
    found = problems(BOTH + RUNNERS[runner])
    if found:
        raise UnsupportedVLLMError(
            f"method 'aasd' can't work on vLLM {patching.vllm_version()} ({runner} model runner): " + "; ".join(found)
        )


def _check_class(members: Members) -> None:
    where = f"{members.module}.{members.attribute}"
    try:
        owner = getattr(importlib.import_module(members.module), members.attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVLLMError(f"vLLM has no {where} any more ({error})") from error
    if isinstance(members, Abstract) and (unknown := owner.__abstractmethods__ - set(members.names)):
        raise UnsupportedVLLMError(f"{where} of vLLM requires {', '.join(sorted(unknown))}, unknown to us")
    names = {name for cls in owner.__mro__ for name in (*vars(cls), *vars(cls).get("__annotations__", {}))}
    missing = [name for name in members.names if name not in names]
    if missing:
        # Most attributes of a runner are only ever assigned.
        source = "\n".join(inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__.startswith("vllm."))
        missing = [name for name in missing if f"self.{name} " not in source and f"self.{name}:" not in source]
    if missing:
        raise UnsupportedVLLMError(f"{where} of vLLM has no {', '.join(missing)} any more")
