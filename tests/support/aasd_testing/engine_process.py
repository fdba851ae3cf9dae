"""The process of an `engines.Engine`: one real vLLM engine, and what tests look up in it.

A process of its own for every engine: its memory, compiled code and patches end with it, and one without speculation
has never seen the plugin at work.
"""

import contextlib
import os
import sys
import types

from aasd_testing.fault_injection import inject
from aasd_testing.process import serve

if os.environ.get("AASD_TEST_V2") == "1":
    # Worker processes, which import this module first, need it too.
    from aasd_testing import v2_on_cpu

    v2_on_cpu.prepare()
    if os.environ.get("AASD_TEST_GLOO") == "1":
        v2_on_cpu.gather_by_gloo()
    if os.environ.get("AASD_TEST_AHEAD") == "1":
        v2_on_cpu.schedule_ahead()

llm = None
adapters = []


def start(options):
    """Start the engine."""
    global llm
    from vllm import LLM
    from vllm.config import ReasoningConfig

    if "reasoning_config" in options:
        options["reasoning_config"] = ReasoningConfig(**options["reasoning_config"])
    llm = LLM(disable_log_stats=False, enforce_eager=True, **options)


def run(requests, fault, record):
    """The fields of an `engines.Round`."""
    prompts, params = [prompt_of(request) for request in requests], [sampling(request) for request in requests]
    before, undo = counters(), inject(fault) if fault else lambda: None
    taken_faults()
    with RECORDERS[record, is_v2()]() as records:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=[adapter(r) for r in requests])
    undo()
    metrics = {name: value - before.get(name, 0) for name, value in counters().items()}
    return {
        "outputs": [described(output) for output in outputs],
        "metrics": metrics,
        "faults": taken_faults(),
        "records": records,
    }


def forget(how):
    """Have the engine forget earlier answers, by resetting its prefix cache or by reloading the model's weights."""
    if how == "reset_prefix_cache":
        assert llm.reset_prefix_cache()
    else:
        llm.collective_rpc(how)


def rpc(method, args):
    """What a worker's method returns."""
    return llm.collective_rpc(method, args=args)


def sampling(request):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = dict(request["sampling"])
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    return SamplingParams(**params)


def prompt_of(request):
    """As vLLM takes it: a text is a user's message; images are noise; embeddings are the model's own of the tokens."""
    ids = request["prompt"]
    if isinstance(ids, str):
        chat = [{"role": "user", "content": ids}]
        ids = llm.get_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if request.get("embeds"):
        import torch

        return {"prompt_embeds": worker().model_runner.get_model().embed_input_ids(torch.tensor(ids)).detach()}
    if not request.get("images"):
        return {"prompt_token_ids": ids, **({"cache_salt": request["salt"]} if request.get("salt") else {})}
    import numpy as np
    from PIL import Image

    noise = [np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8) for seed in request["images"]]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": [Image.fromarray(pixels) for pixels in noise]}}


def adapter(request):
    from vllm.lora.request import LoRARequest

    path = request.get("adapter")
    if path is None:
        return None
    if path not in adapters:
        adapters.append(path)
    return LoRARequest(path, 1 + adapters.index(path), path)


def described(output):
    completion = output.outputs[0]
    return {
        "prompt_token_ids": list(output.prompt_token_ids or ()),
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_cached_tokens": output.num_cached_tokens,
        "logprobs": logprobs(completion.logprobs),
        "prompt_logprobs": logprobs(output.prompt_logprobs),
    }


def logprobs(positions):
    if positions is None:
        return None
    return [None if at is None else {token: value.logprob for token, value in at.items()} for at in positions]


def kernels():
    prefix = "vllm_aasd.kernels."
    return {name.removeprefix(prefix) for name in sys.modules if name.startswith(prefix)}


def worker():
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def is_v2():
    return os.environ.get("AASD_TEST_V2") == "1"


def taken_faults():
    """The counts of the worker's faults, which begin anew."""
    if not hasattr(llm.llm_engine.engine_core.engine_core.model_executor, "driver_worker"):
        return {}
    found = getattr(getattr(worker(), "_adapter", None), "faults", None)
    if found is None:
        return {}
    counts = {component: count for component, count in found.counts.items() if count}
    found.counts.update(dict.fromkeys(found.counts, 0))
    return counts


def counters():
    metrics = llm.get_metrics()
    if getattr(llm.llm_engine.vllm_config.speculative_config, "aasd", None) is not None:
        from vllm_aasd.metrics import get

        metrics += get(llm)
    own = {"model_name", "engine"}
    return {
        ":".join([m.name, *(value for label, value in m.labels.items() if label not in own)]): m.value
        for m in metrics
        if hasattr(m, "value")
    }


def plant(token_id, predicted):
    """Fill the alignment store with what a former owner of every block might have left, and have no prompt written."""
    import torch

    alignment = worker()._adapter._alignment
    if is_v2():
        store, alignment.store_prompts = alignment.store, lambda *args: None
    else:
        store, store_rows = alignment._store, alignment._store_rows
        # Only prompt positions that aren't sampled from need logits of their own.
        alignment._model = types.SimpleNamespace(compute_logits=lambda hidden_states: None)
        alignment._store_rows = lambda logits, *rows: None if logits is None else store_rows(logits, *rows)
    top_k = store.slots.shape[1] // 2
    certain = torch.zeros(top_k)
    certain[0] = 1.0
    store.slots[:, : 1 + top_k] = predicted
    store.slots[:, 0] = token_id
    store.slots[:, 1 + top_k :] = certain.view(torch.int32)


@contextlib.contextmanager
def nothing_recorded():
    yield []


@contextlib.contextmanager
def store_recorded():
    """Whenever drafts are asked for, what the alignment store holds of the first request's context."""
    import numpy as np
    import torch

    from aasd_testing.alignment_rows import read

    runner = worker().model_runner
    proposer, snapshots = runner.drafter, []
    stock = proposer.propose

    def propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **kwargs):
        # Asked first: it stores this step's predictions.
        drafts = stock(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **kwargs)
        if sampled_token_ids[0]:
            view = proposer.adapter._alignment.view(0)
            positions = np.arange(num_tokens_no_spec[0] - 1)
            slots = view.block_table[positions // view.block_size] * view.block_size + positions % view.block_size
            token_ids = token_ids_cpu[0, positions].copy()
            store = proposer.adapter._alignment._store
            ids, probs, fresh = read(store, torch.from_numpy(token_ids), torch.from_numpy(slots).long())
            snapshots.append({"ids": ids.tolist(), "probs": probs.tolist(), "fresh": fresh.tolist()})
        return drafts

    proposer.propose = propose
    yield snapshots
    proposer.propose = stock


@contextlib.contextmanager
def store_recorded_v2():
    """The same on the V2 model runner, of the first request that drafts are asked for; with its token ids."""
    import torch

    from aasd_testing.alignment_rows import read

    runner = worker().model_runner
    speculator, snapshots = runner.speculator, []
    stock = speculator.propose

    def propose(batch, attn_metadata, slot_mappings, hidden_states, aux, num_sampled, *args, **kwargs):
        # Asked first: it stores this step's prompt positions.
        drafts = stock(batch, attn_metadata, slot_mappings, hidden_states, aux, num_sampled, *args, **kwargs)
        if not kwargs.get("dummy_run") and num_sampled[0] > 0:
            slot = int(batch.idx_mapping[0])
            positions = torch.arange(int(runner.req_states.total_len.gpu[slot]) - 1)
            tables, block_size = runner.block_tables.block_tables[0].gpu, runner.block_tables.block_sizes[0]
            slots = tables[slot, positions // block_size].long() * block_size + positions % block_size
            token_ids = runner.req_states.all_token_ids.gpu[slot, positions]
            ids, probs, fresh = read(speculator._alignment.store, token_ids, slots)
            lists = {"ids": ids, "probs": probs, "fresh": fresh, "token_ids": token_ids}
            snapshots.append({name: tensor.tolist() for name, tensor in lists.items()})
        return drafts

    speculator.propose = propose
    yield snapshots
    speculator.propose = stock


@contextlib.contextmanager
def verification_recorded():
    """What the V2 verifier is asked and what it answers, in copies."""
    import torch

    speculator = worker().model_runner.speculator
    verifier, requests, calls = speculator.verifier, speculator.requests, []
    stock = verifier.rejection_sample

    def rejection_sample(**call):
        copied = {name: torch.clone(value) if torch.is_tensor(value) else value for name, value in call.items()}
        given = {
            "stop_token_ids": requests.stop_token_ids.clone(),
            "num_drafts": verifier._num_drafts.clone(),
            "survival": verifier._survival.clone(),
            "totals": torch.zeros_like(verifier._totals),
        }
        policies = [tensor.clone() for tensor in requests.policies]
        sampled, num_sampled = stock(**call)
        answer = {"sampled": sampled.clone(), "num_sampled": num_sampled.clone()}
        calls.append({"call": copied, "policies": policies, "given": given, **answer})
        return sampled, num_sampled

    verifier.rejection_sample = rejection_sample
    yield calls
    verifier.rejection_sample = stock


RECORDERS = {
    (None, False): nothing_recorded,
    (None, True): nothing_recorded,
    ("store", False): store_recorded,
    ("store", True): store_recorded_v2,
    ("verification", True): verification_recorded,
}
"""By what is recorded, and whether the model runner is V2."""


if __name__ == "__main__":
    serve()
