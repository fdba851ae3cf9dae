"""What we use of vLLM's V2 model runner besides what we replace. Most tests run a fake of it, which this checks."""

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
}
# By "module:class", the attributes of its objects.
ATTRIBUTES = {
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": (
        "shard_indices num_added_embeddings org_vocab_size num_embeddings_per_partition"
    ),
    "model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
        "num_org_elements org_vocab_start_index"
    ),
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
