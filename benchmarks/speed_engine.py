"""The engine of one method for `benchmarks.speed`: answers prompts when asked, and says how long each took."""

import json
import os
import sys
import time
from typing import Any


def _main() -> None:
    # Standard output belongs to the answers; what vLLM prints there goes to standard error.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    settings = json.loads(sys.stdin.readline())
    llm = LLM(distributed_executor_backend="uni", **settings).llm_engine
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, **json.loads(line))), file=channel, flush=True)


def _answer(llm: Any, prompts: list[list[int]], concurrency: int, max_tokens: int) -> dict[str, Any]:
    """Keep so many requests going until all prompts are answered.

    Returns:
        ``seconds`` and ``tokens`` in all; per request ``ttft``, seconds to the first token from when it was
        handed in, and ``tpot``, seconds per token after that.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
    begin, waiting = time.perf_counter(), list(enumerate(prompts))[::-1]
    handed_in: dict[str, float] = {}
    first: dict[str, tuple[float, int]] = {}
    ttft, tpot, tokens, running = [0.0] * len(prompts), [0.0] * len(prompts), 0, 0
    while waiting or running:
        while waiting and running < concurrency:
            index, prompt = waiting.pop()
            handed_in[str(index)] = time.perf_counter()
            llm.add_request(str(index), {"prompt_token_ids": prompt}, params)
            running += 1
        for output in llm.step():
            now, count = time.perf_counter(), len(output.outputs[0].token_ids)
            name, index = output.request_id, int(output.request_id)
            if name not in first and count:
                first[name] = now, count
                ttft[index] = now - handed_in[name]
            if output.finished:
                began, early = first[name]
                tpot[index] = (now - began) / max(1, count - early)
                tokens += count
                running -= 1
    return {"seconds": time.perf_counter() - begin, "tokens": tokens, "ttft": ttft, "tpot": tpot}


if __name__ == "__main__":
    _main()
