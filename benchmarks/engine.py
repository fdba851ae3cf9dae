"""One real vLLM engine in a process of its own: requests go in as token ids, tokens and step counts come out.

The engine core runs in the child process itself, so that each of its steps is seen: that gives the exact
number of decode steps of every request, those without drafts included.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from benchmarks.results import ROOT


class EngineError(RuntimeError):
    """The engine's process ended before it had answered; the text holds the end of its log."""


def run_engine(label: str, engine: dict[str, Any], requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start an engine, send it all requests at once, and return what it answered, in their order.

    Args:
        label: how the run is called in the lines of progress.
        engine: arguments of ``vllm.LLM``.
        requests: each ``{"prompt_token_ids": [...], "sampling": {...}}``, the latter for
            ``vllm.SamplingParams``; with ``"score_from": n`` the prompt's tokens from ``n`` on are scored.

    Returns:
        Per request ``token_ids``; ``emitted``, the tokens of each step that emitted any; ``draft_tokens`` and
        ``accepted_tokens``; ``logprobs``, per token a dict of token id to logprob, where they were asked for;
        ``scores``, per scored token its logprob, and that of the likeliest one.

    Raises:
        EngineError: if the process ends early.
    """
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    answers: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            # Left open: the child ends when it is closed, however this process ends.
            print(json.dumps({"engine": engine, "requests": requests}), file=process.stdin, flush=True)
            _progress(f"{label}: starting the engine")
            for line in process.stdout:
                answer = json.loads(line)
                if "ready" in answer:
                    began = time.monotonic()
                    continue
                answers[answer.pop("index")] = answer
                _progress(f"{label}: {len(answers)} of {len(requests)} requests")
            process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            process.kill()
            process.wait()
            _progress("")
        if process.returncode != 0 or len(answers) != len(requests):
            log.seek(0)
            raise EngineError(f"{label}: the engine ended with {process.returncode}\n{log.read()[-4000:]}")
    print(f"{label}: {len(requests)} requests in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return [answers[index] for index in range(len(requests))]


def _progress(text: str) -> None:
    """One line that overwrites itself, on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _main() -> None:
    # Standard output belongs to the answers; what vLLM prints there goes to the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scenario = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    from vllm import LLM, SamplingParams

    llm = LLM(**scenario["engine"]).llm_engine
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for index, request in enumerate(scenario["requests"]):
        params = SamplingParams(detokenize=False, **request["sampling"])
        llm.add_request(str(index), {"prompt_token_ids": request["prompt_token_ids"]}, params)
    emitted: dict[str, list[int]] = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            completion = output.outputs[0]
            steps = emitted.setdefault(output.request_id, [])
            new = len(completion.token_ids) - sum(steps)
            if new > 0:
                steps.append(new)
            if output.finished:
                request = scenario["requests"][int(output.request_id)]
                print(json.dumps(_answer(output, steps, request)), file=channel, flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _answer(output: Any, steps: list[int], request: dict[str, Any]) -> dict[str, Any]:
    completion = output.outputs[0]
    metrics = completion.spec_decode_metrics
    answer = {
        "index": int(output.request_id),
        "token_ids": list(completion.token_ids),
        "emitted": steps,
        "draft_tokens": metrics.num_draft_tokens if metrics else 0,
        "accepted_tokens": sum(j * times for j, times in enumerate(metrics.histogram)) if metrics else 0,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = [
            {token: entry.logprob for token, entry in at.items()} for at in completion.logprobs
        ]
    if "score_from" in request:
        first = request["score_from"]
        scored = zip(request["prompt_token_ids"][first:], output.prompt_logprobs[first:], strict=True)
        answer["scores"] = [
            (at[token].logprob, max(entry.logprob for entry in at.values())) for token, at in scored
        ]
    return answer


if __name__ == "__main__":
    _main()
