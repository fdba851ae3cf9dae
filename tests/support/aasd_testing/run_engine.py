"""Run one real vLLM engine in this process, as JSON on standard input says; JSON goes to the file it names.

A process of its own for every scenario: an engine's memory, compiled code and patches end with it, and a run
without speculation has never seen the plugin at work.
"""

import contextlib
import json
import os
import sys

from aasd_testing.fuzz.seams import owner_of

if os.environ.get("AASD_TEST_V2") == "1":
    # Worker processes, which import this file first, need it too.
    from aasd_testing import v2_on_cpu

    v2_on_cpu.prepare()
    if os.environ.get("AASD_TEST_GLOO") == "1":
        v2_on_cpu.gather_by_gloo()
    if os.environ.get("AASD_TEST_AHEAD") == "1":
        v2_on_cpu.schedule_ahead()


def main() -> None:
    scenario = json.load(sys.stdin)
    set_environment()
    from vllm import LLM, SamplingParams
    from vllm.config import ReasoningConfig
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    if "reasoning_config" in scenario["engine"]:
        scenario["engine"]["reasoning_config"] = ReasoningConfig(**scenario["engine"]["reasoning_config"])
    llm = LLM(disable_log_stats=False, enforce_eager=True, **scenario["engine"])
    tokenizer = llm.get_tokenizer()

    def encoded(message):
        if isinstance(message, list):
            return {"prompt_token_ids": message}
        chat = [{"role": "user", "content": message}]
        return {"prompt_token_ids": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)}

    def sampling(params):
        params = dict(params)
        if "schema" in params:
            params["structured_outputs"] = StructuredOutputsParams(json=params.pop("schema"))
        return SamplingParams(**params)

    recorded = record_store_v2 if scenario["v2"] else record_store
    snapshots = recorded(llm) if scenario["record_store"] else []
    verified = record_verification(llm) if scenario["record_verification"] else None
    adapter = LoRARequest("adapter", 1, scenario["lora"]) if scenario["lora"] else None
    rounds, after = [], []
    for batch, fault in zip(scenario["rounds"], scenario["faults"], strict=True):
        requests = [(encoded(r["prompt"]) | pictures(r.get("images")), sampling(r["sampling"])) for r in batch]
        requests = [(p | salted(r.get("salt")), s) for r, (p, s) in zip(batch, requests, strict=True)]
        requests = [(embedded(llm, p) if r.get("embeds") else p, s) for r, (p, s) in zip(batch, requests, strict=True)]
        num_snapshots = len(snapshots)
        if scenario["plant"] and rounds:
            plant(llm, *scenario["plant"])
        with injected(fault):
            outputs = llm.generate(*map(list, zip(*requests, strict=True)), use_tqdm=False, lora_request=adapter)
        if fault:
            del snapshots[num_snapshots:]
        for snapshot in snapshots[num_snapshots:]:
            snapshot["round"] = len(rounds)
        rounds.append([described(output) for output in outputs])
        after.append({"metrics": counters(llm), "faults": taken_faults(llm) if any(scenario["faults"]) else {}})
    kernels = [name.removeprefix("vllm_aasd.kernels.") for name in sys.modules if name.startswith("vllm_aasd.kernels.")]
    metrics = after[-1]["metrics"]
    result = {"rounds": rounds, "after": after, "metrics": metrics, "store": snapshots, "kernels": kernels}
    with open(scenario["out"], "w") as out:
        json.dump(result, out)
    if verified is not None:
        import torch

        torch.save(verified, scenario["out"] + ".pt")


def set_environment() -> None:
    """What vLLM reads of the environment, for an engine in this process; to be called before vLLM is imported."""
    # The engine, and a single worker, in this process: the store can be read, and two starts of Python are saved.
    # vLLM binds no OpenMP threads then, and several that share a busy core would wait for each other.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Ranks share the few cores there are.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pictures(seeds):
    """Images of noise, one for each seed, as a part of a prompt."""
    if not seeds:
        return {}
    import numpy as np
    from PIL import Image

    noise = [np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8) for seed in seeds]
    return {"multi_modal_data": {"image": [Image.fromarray(pixels) for pixels in noise]}}


def salted(salt):
    """The prefix cache's salt, as a part of a prompt."""
    return {"cache_salt": salt} if salt else {}


def embedded(llm, prompt):
    """The prompt as the model's own embeddings of its tokens."""
    import torch

    model = worker_of(llm).model_runner.get_model()
    return {"prompt_embeds": model.embed_input_ids(torch.tensor(prompt["prompt_token_ids"])).detach()}


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
    return [None if at is None else {str(token): value.logprob for token, value in at.items()} for at in positions]


@contextlib.contextmanager
def injected(fault):
    """While it lasts, a function of the plugin fails whenever it is called; named as in `SEAMS`."""
    if fault is None:
        yield
        return
    owner, name = owner_of(fault)
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        raise RuntimeError(f"injected into {name}")

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, real)


def taken_faults(llm):
    """The counts of the worker's faults, which begin anew."""
    worker = worker_of(llm)
    if not hasattr(worker, "aasd_faults"):
        return {}
    counts = worker.aasd_faults()
    worker._adapter.faults.counts.update(dict.fromkeys(counts, 0))
    return counts


def worker_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def counters(llm):
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


def plant(llm, token_id, predicted):
    """Fill the alignment store with what a former owner of every block might have left, and have no prompt written."""
    import torch

    adapter = worker_of(llm)._adapter
    alignment = adapter._alignment
    alignment.with_prompts, alignment.store_prompts = False, lambda *args: None
    store = getattr(alignment, "store", None) or alignment._store
    certain = torch.zeros(store.top_k)
    certain[0] = 1.0
    store.slots[:, : 1 + store.top_k] = predicted
    store.slots[:, 0] = token_id
    store.slots[:, 1 + store.top_k :] = certain.view(torch.int32)


def record_store(llm):
    """Note, whenever drafts are asked for, what the alignment store holds of the first request's context."""
    import numpy as np
    import torch

    runner = worker_of(llm).model_runner
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
            ids, probs, fresh = store.read(torch.from_numpy(token_ids), torch.from_numpy(slots).long())
            snapshots.append({"ids": ids.tolist(), "probs": probs.tolist(), "fresh": fresh.tolist()})
        return drafts

    proposer.propose = propose
    return snapshots


def record_store_v2(llm):
    """The same on the V2 model runner, of the first request that drafts are asked for; with its token ids."""
    import torch

    runner = worker_of(llm).model_runner
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
            ids, probs, fresh = speculator._alignment.store.read(token_ids, slots)
            lists = {"ids": ids, "probs": probs, "fresh": fresh, "token_ids": token_ids}
            snapshots.append({name: tensor.tolist() for name, tensor in lists.items()})
        return drafts

    speculator.propose = propose
    return snapshots


def record_verification(llm):
    """Note what the V2 verifier is asked and what it answers, in copies."""
    import torch

    speculator = worker_of(llm).model_runner.speculator
    verifier, requests, calls = speculator.verifier, speculator.requests, []
    stock = verifier.rejection_sample

    def rejection_sample(**call):
        copied = {name: torch.clone(value) if torch.is_tensor(value) else value for name, value in call.items()}
        policies = [tensor.clone() for tensor in requests.policies]
        stop_token_ids = requests.stop_token_ids.clone()
        sampled, num_sampled = stock(**call)
        answer = {"sampled": sampled.clone(), "num_sampled": num_sampled.clone()}
        calls.append({"call": copied, "policies": policies, "stop_token_ids": stop_token_ids, **answer})
        return sampled, num_sampled

    verifier.rejection_sample = rejection_sample
    return calls


if __name__ == "__main__":
    main()
