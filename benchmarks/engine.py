"""A real vLLM engine in a process of its own: requests go in as token ids; tokens, steps and times come out.

`Engine` starts this module as a program, whose standard input and output carry lines of JSON. The engine core runs in
that process itself, one step after the other, without HTTP and detokenizing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Self

from benchmarks.results import ROOT

_PROMPT = "prompt_token_ids", "cache_salt"


class EngineError(RuntimeError):
    """The engine's process ended before it had answered; the text holds the end of its log."""


class Engine:
    """One engine, from `__enter__` to `__exit__`; between two runs it sleeps.

    Args:
        label: its name in messages.
        engine: arguments of ``vllm.LLM``.
        core: the only CPU core that it may run on; None for any.
        threads: of OpenMP.
        mend_sampling: whether to mend vLLM's own sampler on CPUs, see `mend_sampling`.
    """

    def __init__(
        self, label: str, engine: dict[str, Any], core: int | None = None, threads: int = 1, mend_sampling: bool = False
    ) -> None:
        self._label = label
        self._scenario = {"engine": engine, "core": core, "mend_sampling": mend_sampling}
        self._environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "OMP_NUM_THREADS": str(threads)}
        # The engine core runs in the child itself, so that each of its steps is seen.
        self._environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine"],
            cwd=ROOT,
            env=self._environment,
            # Left open: the child ends when it is closed, however this process ends.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._ask(self._scenario)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def run(self, requests: list[dict[str, Any]], concurrency: int | None = None) -> tuple[list[dict[str, Any]], float]:
        """Send requests, and wait until all are answered.

        Args:
            requests: each ``{"prompt_token_ids": [...], "sampling": {...}}``, the latter for ``vllm.SamplingParams``.
                Only requests of the same ``cache_salt`` share prefixes and answers.
            concurrency: requests in flight, the next one sent when one ends; None for all at once.

        Returns:
            The answers in the requests' order, and the seconds from the first request to the last answer. Per answer
            ``token_ids``; ``steps`` that emitted any; ``sent``, ``first_token`` and ``last_token`` in seconds since the
            run began; ``drafted`` and ``accepted`` tokens, of vLLM's own metrics; ``logprobs`` and ``prompt_logprobs``
            where they were asked for, per token a dict of token id to logprob, or None.

        Raises:
            EngineError: if the process ends early.
        """
        found = self._ask({"run": requests, "concurrency": concurrency or max(len(requests), 1)})
        return found["answers"], found["seconds"]

    def forget(self) -> None:
        """Drop what the engine keeps of earlier requests: cached prefixes, and answers to draft from."""
        self._ask({"forget": True})

    def metrics(self) -> dict[str, float]:
        """All of aasd's metrics since the engine began to serve, by name and their own label."""
        return self._ask({"metrics": True})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline() if self._process.stdout else ""
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise EngineError(f"{self._label}: the engine ended with {code}\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


def main() -> None:
    """Serve one engine until standard input is closed."""
    # Standard output belongs to the answers; what vLLM prints there goes to the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scenario = json.loads(sys.stdin.readline())
    if scenario["core"] is not None:
        # Before torch counts the cores.
        os.sched_setaffinity(0, {scenario["core"]})

    from vllm import LLM

    llm = LLM(**scenario["engine"])
    engine = llm.llm_engine
    if scenario["mend_sampling"]:
        mend_sampling()
    print("{}", file=channel, flush=True)
    num_sent = 0
    for line in sys.stdin:
        message = json.loads(line)
        reply: dict[str, Any] = {}
        if "forget" in message:
            engine.reset_prefix_cache()
            engine.collective_rpc(_forget_answers)
        elif "metrics" in message:
            from vllm_aasd import metrics

            for counter in metrics.get(llm):
                own = [value for name, value in counter.labels.items() if name not in ("model_name", "engine")]
                reply[":".join([counter.name, *own])] = counter.value
        else:
            reply = answer(engine, message["run"], message["concurrency"], num_sent)
            num_sent += len(message["run"])
        print(json.dumps(reply), file=channel, flush=True)


def answer(engine: Any, requests: list[dict[str, Any]], concurrency: int, first_id: int) -> dict[str, Any]:
    """Answer requests, `concurrency` in flight, as if as many clients each waited for their answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(structured_outputs: dict[str, Any] | None = None, **sampling: Any) -> SamplingParams:
        grammar = StructuredOutputsParams(**structured_outputs) if structured_outputs else None
        return SamplingParams(detokenize=False, structured_outputs=grammar, **sampling)

    # An id that comes again would let vLLM's suffix decoding drop what it has learned.
    waiting = [
        (str(first_id + index), request, params(**request["sampling"])) for index, request in enumerate(requests)
    ][::-1]
    logs: dict[str, dict[str, Any]] = {}
    finished = {}
    begin = time.perf_counter()
    while waiting or logs:
        while waiting and len(logs) < concurrency:
            request_id, request, sampling = waiting.pop()
            logs[request_id] = {"sent": time.perf_counter() - begin, "steps": 0, "tokens": 0}
            engine.add_request(request_id, {name: request[name] for name in _PROMPT if name in request}, sampling)
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            log = logs[output.request_id]
            if len(output.outputs[0].token_ids) > log["tokens"]:
                log.setdefault("first_token", now)
                log |= {"last_token": now, "steps": log["steps"] + 1, "tokens": len(output.outputs[0].token_ids)}
            if output.finished:
                finished[output.request_id] = output, logs.pop(output.request_id)
    seconds = time.perf_counter() - begin
    # Only now: the run isn't made to wait for JSON.
    return {
        "answers": [_answer(*finished[str(first_id + index)]) for index in range(len(requests))],
        "seconds": seconds,
    }


def mend_sampling() -> None:
    """Mend two faults of vLLM's CPU build, which make its own methods sample garbage at temperature > 0.

    The verifier that comes with the mend does nothing here: without aasd, vLLM's own function is called.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_aasd.engine.v1 import sampler_patches

        sampler_patches.install()


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
    return {
        "token_ids": list(completion.token_ids),
        "steps": log["steps"],
        "sent": log["sent"],
        "first_token": log.get("first_token"),
        "last_token": log.get("last_token"),
        "drafted": metrics.num_draft_tokens if metrics else 0,
        "accepted": sum(j * times for j, times in enumerate(metrics.histogram)) if metrics else 0,
        "logprobs": _logprobs(completion.logprobs),
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
    }


def _logprobs(of: Any) -> list[dict[int, float] | None] | None:
    return of and [at and {token: entry.logprob for token, entry in at.items()} for at in of]


if __name__ == "__main__":
    main()
