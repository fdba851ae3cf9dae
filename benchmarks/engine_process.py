"""The process of `benchmarks.engine.Engine`: the engine core runs in it, one step after the other.

Lines of JSON come in on standard input, first the engine's arguments, then runs; answers go out on standard
output.
"""

import json
import os
import queue
import sys
import threading
import time
from typing import Any


def main() -> None:
    """Serve runs until standard input is closed."""
    # Standard output belongs to the answers; what vLLM prints there goes to the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    scenario = json.loads(messages.get())
    if scenario["core"] is not None:
        # Before torch counts the cores.
        os.sched_setaffinity(0, {scenario["core"]})

    import torch
    from vllm import LLM

    engine = LLM(**scenario["engine"]).llm_engine
    if scenario["mend_sampling"]:
        mend_sampling()
    _send(channel, {"ready": {"threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0))}})
    num_sent = 0
    while True:
        message = json.loads(messages.get())
        if "forget" in message:
            forget(engine)
            _send(channel, {})
            continue
        run(engine, message, num_sent, channel)
        num_sent += len(message["run"])


def run(engine: Any, message: dict[str, Any], first_id: int, channel: Any) -> None:
    """Answer requests, ``concurrency`` in flight: as clients would that each wait for their answer."""
    from vllm import SamplingParams

    requests, concurrency = message["run"], message["concurrency"]
    # An id that comes again would let vLLM's suffix decoding drop what it has learnt.
    waiting = [
        (str(first_id + index), request, SamplingParams(detokenize=False, **request["sampling"]))
        for index, request in enumerate(requests)
    ]
    waiting.reverse()
    logs: dict[str, dict[str, Any]] = {}
    finished = []
    begin = time.perf_counter()
    while waiting or logs:
        while waiting and len(logs) < concurrency:
            request_id, request, params = waiting.pop()
            logs[request_id] = {"sent": time.perf_counter() - begin, "emitted": [], "request": request}
            engine.add_request(request_id, {"prompt_token_ids": request["prompt_token_ids"]}, params)
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            log = logs[output.request_id]
            steps = log["emitted"]
            new = len(output.outputs[0].token_ids) - sum(steps)
            if new > 0:
                log.setdefault("first_token", now)
                log["last_token"] = now
                steps.append(new)
            if output.finished:
                finished.append((output, logs.pop(output.request_id)))
                if message["count"]:
                    _send(channel, {"done": len(finished)})
    seconds = time.perf_counter() - begin
    # Written only now: the run isn't made to wait for a pipe, nor for JSON.
    for output, log in finished:
        _send(channel, {"index": int(output.request_id) - first_id, **_answer(output, log)})
    _send(channel, {"seconds": seconds})


def mend_sampling() -> None:
    """Mend two faults of vLLM's CPU build, which make its own methods sample from garbage at temperature > 0.

    The verifier that comes with it stays out of the way: without `aasd`, vLLM's own function is called.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier

        v1_verifier.install()


def forget(engine: Any) -> None:
    """Drop what an engine keeps of requests that have ended: cached prefixes, suffix decoding's answers.

    A benchmark that asks the same questions in several rounds must do so between them: a method that has
    seen the very answer would otherwise be measured on how well it remembers it.
    """
    engine.reset_prefix_cache()
    engine.collective_rpc(_forget_answers)


def _forget_answers(worker: Any) -> None:
    config = worker.vllm_config.speculative_config
    if config is not None and config.method == "suffix":
        from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

        worker.model_runner.drafter = SuffixDecodingProposer(worker.vllm_config)
    elif hasattr(worker, "aasd_clear_memory"):
        worker.aasd_clear_memory()


def _answer(output: Any, log: dict[str, Any]) -> dict[str, Any]:
    completion = output.outputs[0]
    metrics = completion.spec_decode_metrics
    accepted = metrics.histogram if metrics else []
    answer = {
        "token_ids": list(completion.token_ids),
        "emitted": log["emitted"],
        "sent": log["sent"],
        "first_token": log.get("first_token"),
        "last_token": log.get("last_token"),
        "draft_tokens": metrics.num_draft_tokens if metrics else 0,
        "accepted_tokens": sum(j * times for j, times in enumerate(accepted)),
        "drafted": list(metrics.per_step_drafted) if metrics else [],
        "accepted": list(metrics.per_step_accepted) if metrics else [],
    }
    if completion.logprobs is not None:
        answer["logprobs"] = [{token: entry.logprob for token, entry in at.items()} for at in completion.logprobs]
    request = log["request"]
    if output.prompt_logprobs is not None and "score_from" not in request:
        answer["prompt_logprobs"] = [
            at and {token: entry.logprob for token, entry in at.items()} for at in output.prompt_logprobs
        ]
    if "score_from" in request:
        first = request["score_from"]
        scored = zip(request["prompt_token_ids"][first:], output.prompt_logprobs[first:], strict=True)
        answer["scores"] = [(at[token].logprob, max(entry.logprob for entry in at.values())) for token, at in scored]
    return answer


def _read(messages: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        messages.put(line)
    os._exit(1)


def _send(channel: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=channel, flush=True)


if __name__ == "__main__":
    main()
