"""Run an engine scenario in a process of its own; see run_engine.py."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_RUNNER = pathlib.Path(__file__).parent / "run_engine.py"
_SWITCHES = ("gloo", "ahead")


def run_engine(model: str, rounds: list[list[dict]], out: pathlib.Path, **options: Any) -> dict:
    """Start an engine, send it the rounds of requests one after the other, and return what it answered.

    Args:
        model: path of the checkpoint.
        rounds: each a list of ``{"prompt": str | list[int], "sampling": {...}}`` that run at once; with ``images``, a
            list of seeds, that many images of noise come with the prompt; with ``embeds`` true, it comes as embeddings;
            with ``salt``, it has that ``cache_salt``.
        out: where the process writes its result.
        **options: ``aasd`` (dict: the speculative config's keys; absent for no speculation), ``record_store``,
            ``record_verification`` (V2 only: what the verifier was asked and answered, in ``<out>.pt``),
            ``plant`` (a token and another: before every round but the first, the whole store is filled with entries of
            the one that predict the other),
            ``lora`` (path of an adapter for all requests),
            ``faults`` (of each round, the function of ours that fails in it, as in `SEAMS`, or None),
            ``v2`` (bool: the V2 model runner, its kernels interpreted: about 11 tokens a second), ``gloo`` and
            ``ahead`` (V2 only: see `v2_on_cpu`), and whatever `vllm.LLM` takes.

    Returns:
        ``{"rounds": [[output, ...], ...], "after": [{"metrics": {name: value}, "faults": {place: count}}, ...] for
        each round, "metrics": {name: value} at the end, "store": [snapshot, ...], "kernels": [module, ...],
        "log": str}``
    """
    recorded = {name: options.pop(name, False) for name in ("record_store", "record_verification", "plant")}
    faults = options.pop("faults", [None] * len(rounds))
    aasd, v2 = options.pop("aasd", None), options.pop("v2", False)
    switches = {f"AASD_TEST_{name.upper()}": str(int(options.pop(name, False))) for name in _SWITCHES}
    if v2:
        # The CPU's attention takes blocks of whole 32 tokens there.
        options = {"max_num_seqs": 3, "block_size": 32, "max_model_len": 512, **options}
    lora = options.pop("lora", None)
    if lora is not None:
        options["enable_lora"] = True
    num_ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    executor = "uni" if num_ranks == 1 else "mp"
    engine = {
        "model": model,
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "distributed_executor_backend": executor,
        **options,
    }
    if aasd is not None:
        engine["speculative_config"] = {"method": "aasd", **aasd}
    scenario = {"engine": engine, "rounds": rounds, "faults": faults, "out": str(out)}
    scenario.update(v2=v2, lora=lora, **recorded)
    path = os.pathsep.join(filter(None, (str(_RUNNER.parents[1]), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, str(_RUNNER)],
        input=json.dumps(scenario),
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "AASD_TEST_V2": str(int(v2)), "PYTHONPATH": path, **switches},
    )
    log = process.stdout + process.stderr
    assert process.returncode == 0, log[-30000:]
    return {**json.loads(out.read_text()), "log": log}


def greedy(prompts: list, max_tokens: int = 48, **sampling: Any) -> list[dict]:
    """One round of greedy requests."""
    params = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return [{"prompt": prompt, "sampling": params} for prompt in prompts]


def token_ids(outputs: list[dict]) -> list[list[int]]:
    """The emitted tokens of each output of a round."""
    return [output["token_ids"] for output in outputs]


def drafted_and_accepted(result: dict) -> tuple[float, float]:
    """The draft tokens of a run, or up to the end of a round, and those accepted; by vLLM's counters."""
    metrics = result["metrics"]
    return metrics["vllm:spec_decode_num_draft_tokens"], metrics["vllm:spec_decode_num_accepted_tokens"]
