"""What we use of vLLM besides what we replace: in a new version, it has to be there and take the same parameters.

vLLM's V2 model runner only runs here as a fake, which this keeps honest.
"""

import importlib
import inspect
import re

import pytest

from vllm_aasd.engine.v2.requests import RequestSlots
from vllm_aasd.engine.v2.speculator import AASDSpeculator

# By "module:function", the first parameters.
PARAMETERS = {
    "distributed.parallel_state:GroupCoordinator.all_gather": "self input_ dim",
    "model_executor.layers.logits_processor:LogitsProcessor.forward": (
        "self lm_head hidden_states embedding_bias skip_gather"
    ),
    "v1.core.sched.async_scheduler:AsyncScheduler": "",
    "v1.core.sched.scheduler:Scheduler.schedule": "self",
    "v1.core.sched.scheduler:Scheduler.update_from_output": "self scheduler_output model_runner_output",
    "v1.sample.rejection_sampler:generate_uniform_probs": "num_tokens num_draft_tokens generators device",
    "v1.sample.sampler:Sampler.compute_logprobs": "logits",
    "v1.sample.sampler:Sampler.forward": "self logits sampling_metadata predict_bonus_token",
    "v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits": (
        "self logits predict_bonus_token spec_token_ids"
    ),
    "v1.spec_decode.custom_class_proposer:create_custom_proposer": "vllm_config",
    "v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.add_request": "self req_idx sampling_params",
    "v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply": "self logits ctx",
    "v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply_staged_writes": "self",
    "v1.worker.gpu.sample.logprob:LogprobTokenIdsState.max_num_token_ids": "self idx_mapping_np",
    "v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture": "self",
    "v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager": "self cudagraph_mode",
    "v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose": (
        "self input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled "
        "num_rejected last_sampled next_prefill_tokens temperature seeds"
    ),
    "v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "self",
    "v1.worker.gpu_worker:Worker.determine_available_memory": "self",
    "v1.worker.gpu_worker:Worker.execute_model": "self scheduler_output",
    "v1.worker.gpu_worker:Worker.init_device": "self",
    "v1.worker.gpu_worker:Worker.initialize_from_config": "self kv_cache_config",
    "v1.worker.gpu_worker:Worker.load_model": "self",
    "v1.worker.gpu_worker:Worker.sample_tokens": "self grammar_output",
    "v1.worker.gpu_worker:Worker.shutdown": "self",
    "v1.worker.gpu_worker:Worker.take_draft_token_ids": "self",
    "v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras": (
        "self prompt_lora_mapping token_lora_mapping lora_requests"
    ),
}
# By "module:class", the attributes of its objects.
ATTRIBUTES = {
    "config:ModelConfig": "served_model_name",
    "config:ParallelConfig": "data_parallel_index",
    "distributed.parallel_state:GroupCoordinator": "world_size rank_in_group cpu_group broadcast_object",
    "engine.arg_utils:EngineArgs": "disable_log_stats scheduler_cls",
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": (
        "shard_indices num_added_embeddings org_vocab_size num_embeddings_per_partition"
    ),
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
        "num_org_elements org_vocab_start_index"
    ),
    "multimodal.inputs:MultiModalFeatureSpec": "mm_position",
    "multimodal.inputs:PlaceholderRange": "extract_embeds_range",
    "sampling_params:SamplingParams": (
        "all_stop_token_ids extra_args max_tokens num_logprobs sampling_type structured_outputs temperature "
        "logprob_token_ids min_tokens thinking_token_budget"
    ),
    "v1.core.sched.output:CachedRequestData": "req_ids resumed_req_ids new_block_ids num_computed_tokens",
    "v1.core.sched.output:NewRequestData": "prompt_token_ids mm_features block_ids num_computed_tokens",
    "v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs scheduled_cached_reqs finished_req_ids num_scheduled_tokens "
        "scheduled_spec_decode_tokens has_structured_output_requests"
    ),
    "v1.core.sched.scheduler:Scheduler": "dynamic_sd_lookup max_num_scheduled_tokens",
    "v1.kv_cache_interface:FullAttentionSpec": "block_size page_size_bytes",
    "v1.kv_cache_interface:KVCacheConfig": "num_blocks kv_cache_groups",
    "v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "v1.metrics.reader:Counter": "name labels value",
    "v1.outputs:DraftTokenIds": "req_ids draft_token_ids",
    "v1.outputs:LogprobsTensors": "logprob_token_ids logprobs selected_token_ranks",
    "v1.outputs:ModelRunnerOutput": "req_id_to_index sampled_token_ids",
    "v1.outputs:SamplerOutput": "sampled_token_ids logprobs_tensors",
    "v1.sample.logits_processor:MinTokensLogitsProcessor": "min_toks",
    "v1.sample.metadata:SamplingMetadata": (
        "all_greedy temperature generators max_num_logprobs logprob_token_ids no_penalties "
        "allowed_token_ids_mask bad_words_token_ids logitsprocs thinking_budget_state_holder"
    ),
    "v1.sample.rejection_sampler:RejectionSampler": "sampler is_logits_logprobs_mode",
    "v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": (
        "_state in_spec_mode has_tracked_requests update_state"
    ),
    "v1.spec_decode.metadata:SpecDecodeMetadata": (
        "logits_indices num_draft_tokens draft_token_ids max_spec_len cu_num_draft_tokens "
        "target_logits_indices bonus_logits_indices"
    ),
    "v1.worker.block_table:BlockTable": "block_table slot_mapping block_size",
    "v1.worker.gpu.block_table:BlockTables": "block_tables block_sizes",
    "v1.worker.gpu.buffer_utils:UvaBackedTensor": "np gpu copy_to_uva",
    "v1.worker.gpu.input_batch:InputBatch": (
        "num_reqs idx_mapping idx_mapping_np input_ids logits_indices query_start_loc_np is_prefilling_np"
    ),
    "v1.worker.gpu.model_runner:ExecuteModelState": "input_batch slot_mappings_by_layer hidden_states",
    "v1.worker.gpu.model_runner:GPUModelRunner": "speculator sampler model get_model block_tables execute_model_state",
    "v1.worker.gpu.sample.sampler:Sampler": "logits_processors sampling_states logprob_token_ids_state",
    "v1.worker.gpu.sample.states:SamplingStates": "temperature",
    "v1.worker.gpu.states:RequestState": "all_token_ids total_len max_seq_len max_num_reqs index_to_req_id",
    "v1.worker.gpu_input_batch:InputBatch": "req_ids block_table generators req_prompt_embeds",
    "v1.worker.gpu_model_runner:ExecuteModelState": "scheduler_output logits spec_decode_metadata hidden_states",
    "v1.worker.gpu_model_runner:GPUModelRunner": (
        "drafter execute_model_state input_batch input_ids requests discard_request_mask _dummy_run"
    ),
    "v1.worker.gpu_worker:Worker": "use_v2_model_runner get_kv_cache_spec model_runner",
}
# By "module:class", the abstract classes that we implement.
ABSTRACT = {
    "v1.worker.gpu.spec_decode.speculator:BaseSpeculator": AASDSpeculator,
    "v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor": RequestSlots,
}


def find(where):
    module, path = where.split(":")
    found = importlib.import_module(f"vllm.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


def missing(cls, names):
    """The names that no object of a class has; most attributes of a runner are only ever assigned."""
    declared = {name for base in cls.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    source = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("vllm."))
    return [name for name in names if name not in declared and not re.search(rf"self\.{name}[ :]", source)]


@pytest.mark.parametrize("where", PARAMETERS)
def test_functions_take_the_parameters_that_we_know(where):
    expected = PARAMETERS[where].split()
    assert list(inspect.signature(find(where)).parameters)[: len(expected)] == expected


@pytest.mark.parametrize("where", ATTRIBUTES)
def test_objects_have_the_attributes_that_we_use(where):
    assert missing(find(where), ATTRIBUTES[where].split()) == []
    assert missing(find(where), ["no_such_attribute"]) == ["no_such_attribute"]


@pytest.mark.parametrize("where", ABSTRACT)
def test_we_define_what_an_abstract_class_demands(where):
    assert find(where).__abstractmethods__ <= set(vars(ABSTRACT[where]))
