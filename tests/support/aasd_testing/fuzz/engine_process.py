"""Run cases against one real vLLM engine in this process, as JSON on standard input says; JSON goes to the file it names.

A step's ``wait`` is engine steps here, at most `MAX_WAIT`; a request is left as soon as it has emitted so many tokens.
"""

import dataclasses
import json
import sys
import time
from typing import Any

# Prepares this process for the V2 model runner, too, where that is asked for.
from aasd_testing.run_engine import set_environment

MAX_WAIT = 3


def main() -> None:
    """Run every case in turn, and look at the worker after each."""
    asked = json.load(sys.stdin)
    set_environment()
    from vllm import LLM

    from aasd_testing.fuzz.limits import PROFILES

    limits = PROFILES[asked["profile"]]
    llm = LLM(
        model=asked["model"],
        enforce_eager=True,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        speculative_config={"method": "aasd", **limits.aasd},
        worker_extension_cls="aasd_testing.fuzz.hooks.FuzzHooks",
        **limits.engine,
    )
    llm.collective_rpc("fuzz_begin", args=(asked["mutant"],))
    runs = []
    for case in asked["cases"]:
        run = Run(llm, asked["model"])
        seen = run.run(case["steps"])
        llm.collective_rpc("fuzz_calm")
        shown = [None if one is None else {**dataclasses.asdict(one), "disturbed": []} for one in seen]
        runs.append({"seen": shown, "look": llm.collective_rpc("fuzz_look")[0], "metrics": metrics(llm)})
    with open(asked["out"], "w") as out:
        json.dump(runs, out)


def metrics(llm: Any) -> dict[str, float]:
    """vLLM's counters, by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


class Run:
    """One case on a live engine."""

    def __init__(self, llm: Any, model: str) -> None:
        from aasd_testing.fuzz.prompts_of_tokens import Prompts

        self._llm, self._engine, self._prompts = llm, llm.llm_engine, Prompts(model)
        self._seen: list[Any] = []
        self._steps: dict[str, tuple[int, dict[str, Any]]] = {}
        self._finished: dict[str, dict[int, Any]] = {}

    def run(self, steps: list[dict[str, Any]]) -> list[Any]:
        """What became of each request, None for events."""
        self._seen = [None] * len(steps)
        for index, step in enumerate(steps):
            if step["do"] == "ask":
                self._ask(index, step)
            else:
                self._event(step)
            for _ in range(min(step["wait"], MAX_WAIT)):
                self._step()
        # A lost request would have the engine at work for ever.
        deadline = time.monotonic() + 900
        while self._engine.has_unfinished_requests() and time.monotonic() < deadline:
            self._step()
        self._step()
        return self._seen

    def _ask(self, index: int, step: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        from aasd_testing.fuzz.observed import Observation

        seen = self._seen[index] = Observation()
        params = {**step["sampling"], "extra_args": step["xargs"], "output_kind": RequestOutputKind.CUMULATIVE}
        if "structured_outputs" in params:
            params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
        if "logit_bias" in params:
            params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
        name = f"fuzz-{index}"
        prompt = {"prompt_token_ids": self._prompts.ids(step["prompt"])}
        try:
            self._engine.add_request(name, prompt, SamplingParams(**params), priority=step["priority"])
        except VLLMClientError as error:
            seen.status, seen.error = 400, str(error)
            return
        self._steps[name] = index, step
        if step.get("leave_after") == 0:
            self._leave(name, seen)

    def _leave(self, name: str, seen: Any) -> None:
        seen.status, seen.left = 200, True
        del self._steps[name]
        self._engine.abort_request([name])

    def _step(self) -> None:
        for output in self._engine.step():
            if output.request_id not in self._steps:
                continue
            index, step = self._steps[output.request_id]
            seen = self._seen[index]
            seen.status = 200
            seen.num_prompt_tokens = len(output.prompt_token_ids)
            # A request of several ends choice by choice, and tells only of those that went on.
            choices = self._finished.setdefault(output.request_id, {})
            choices.update({part.index: described(part, output) for part in output.outputs})
            seen.choices = [choices[number] for number in sorted(choices)]
            emitted = sum(len(choice.token_ids) for choice in seen.choices)
            if output.finished:
                seen.num_answer_tokens = emitted
                del self._steps[output.request_id], self._finished[output.request_id]
            elif step.get("leave_after") and emitted >= step["leave_after"]:
                self._leave(output.request_id, seen)

    def _event(self, step: dict[str, Any]) -> None:
        match step["do"]:
            case "fault":
                self._llm.collective_rpc("fuzz_inject", args=(step["where"], step["place"], str(step["times"])))
            case "off":
                self._llm.collective_rpc("fuzz_off", args=(step["place"],))
            case "on":
                self._llm.collective_rpc("fuzz_calm")
            case "clear_memory":
                self._llm.collective_rpc("aasd_clear_memory")
            case "reset_prefix_cache":
                self._engine.reset_prefix_cache(step["running"])


def described(part: Any, output: Any) -> Any:
    """One choice of vLLM's as the fuzzer sees it."""
    from aasd_testing.fuzz.observed import Choice

    rows = None
    if part.logprobs is not None:
        rows = [(at[token].logprob, len(at)) for token, at in zip(part.token_ids, part.logprobs, strict=True)]
    positions = None if output.prompt_logprobs is None else len(output.prompt_logprobs)
    return Choice(list(part.token_ids), part.text, part.finish_reason, part.stop_reason, rows, positions)


if __name__ == "__main__":
    main()
