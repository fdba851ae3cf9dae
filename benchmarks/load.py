"""Overload: more requests at once on the real server than its KV cache holds, with and without aasd.

    python -m benchmarks.load --builtin
    python -m benchmarks.load --data question.jsonl --builtin --requests 64 --blocks 64

All requests are sent at the same time, streamed, and greedy. The cache is cut to ``--blocks`` blocks of 32 tokens, about
ten requests' worth, so most of them wait, and those that run are preempted now and then. Each method has a server of
its own, started once.

Before any figure is written: every request must have been answered to its end, the server must have ended exactly
those, and in float32 (the default) the answers of ``aasd strict`` must be those of ``none``, but for ties nearer than
`benchmarks.methods.NEAR_TIE`, which ``none`` is asked to judge.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np

from benchmarks import exactness, methods, results, traces
from benchmarks.engine import progress_line
from benchmarks.server import Server, ServerError
from vllm_aasd.tuning.json_lines import DataError
from vllm_aasd.tuning.prompts import load_tokenizer, tokenise

BLOCK_SIZE = 32

METHODS: dict[str, dict[str, Any] | None] = {
    "aasd strict": {"method": "aasd", "aasd_verification": "strict"},
    "aasd": {"method": "aasd"},
    "none": None,
}
"""``none`` comes last: it is still there to judge where answers differ."""

EXACT = ("aasd strict",)

PERCENTILES = (50, 95, 99)


class Answer(NamedTuple):
    """What became of one request.

    Attributes:
        token_ids: of the answer.
        finish_reason: vLLM's.
        first: seconds from sending to the first token.
        last: seconds from sending to the last.
    """

    token_ids: list[int]
    finish_reason: str | None
    first: float
    last: float


def main() -> None:
    """Measure every method, write the result, print its table; exit code 1 if anything was lost or differs."""
    arguments = _arguments()
    if arguments.show:
        print(report(results.read(arguments.show)))
        return
    results.require_model(arguments)
    try:
        result = measure(arguments)
    except (DataError, OSError, ValueError, ServerError, httpx.HTTPError) as error:
        sys.exit(f"error: {error}")
    results.write(arguments.out, result)
    print(report(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all methods; returns the result.

    Raises:
        ServerError: if anything was lost, or answers differ that should not.
    """
    tasks = traces.measured_tasks(arguments)
    prompts = tokenise(load_tokenizer(arguments.model), tasks, arguments.max_prompt_tokens)[: arguments.requests]
    if len(prompts) < arguments.requests:
        raise DataError(f"{len(prompts)} prompts are too few for {arguments.requests} requests: raise --limit")
    runs: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[Answer]] = {}
    verdicts: dict[str, Any] = {}
    for label, speculative_config in METHODS.items():
        extra = server_arguments(arguments, speculative_config)
        with Server(arguments.model, extra, lambda text, label=label: progress_line(f"{label}: {text}")) as server:
            # Compiled code and the server's own first request aren't what is measured.
            asyncio.run(flood(server.url, prompts[:2], 4))
            before, finished, preempted = server.spec_counters(), server.num_finished(), num_preempted(server.url)
            progress_line(f"{label}: {len(prompts)} requests at once")
            began = time.monotonic()
            answers[label] = asyncio.run(flood(server.url, prompts, arguments.max_tokens))
            seconds = time.monotonic() - began
            ended = {reason: n - finished.get(reason, 0) for reason, n in server.num_finished().items()}
            check(label, answers[label], ended, arguments.max_tokens)
            runs[label] = {
                "seconds": round(seconds, 2),
                "preemptions": num_preempted(server.url) - preempted,
                **server.spec_counters().since(before)._asdict(),
                "rows": [[len(one.token_ids), round(one.first, 4), round(one.last, 4)] for one in answers[label]],
            }
            if speculative_config is None:
                verdicts = judged(server.url, prompts, answers, methods.NEAR_TIE[arguments.dtype])
    progress_line("")
    wrong = exactness.failed({label: verdicts[label] for label in EXACT})
    if wrong:
        raise ServerError(f"answers aren't the target's own: {', '.join(wrong)}: {verdicts}")
    metadata = results.metadata(
        **results.conditions(arguments), omp_num_threads=os.environ.get("OMP_NUM_THREADS"), sampling="greedy"
    )
    labels = list(reversed(METHODS))
    return {
        "metadata": metadata,
        "methods": {label: METHODS[label] for label in labels},
        "kv_cache_tokens": arguments.blocks * BLOCK_SIZE,
        "wanted_tokens": sum(len(prompt) + arguments.max_tokens for prompt in prompts),
        "runs": {label: runs[label] for label in labels},
        "exactness": verdicts,
        "figures": [figures(label, runs[label]) for label in labels],
    }


def server_arguments(arguments: argparse.Namespace, speculative_config: dict[str, Any] | None) -> list[str]:
    """Those of ``vllm serve``."""
    extra = ["--dtype", arguments.dtype, "--block-size", str(BLOCK_SIZE)]
    # A chat template adds to a prompt.
    extra += ["--max-model-len", str(arguments.max_prompt_tokens + arguments.max_tokens + 64)]
    extra += ["--num-gpu-blocks-override", str(arguments.blocks), "--max-num-seqs", str(arguments.requests)]
    return extra if speculative_config is None else [*extra, "--speculative-config", json.dumps(speculative_config)]


async def flood(url: str, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer]:
    """Send all prompts at once and read their answers."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        return await asyncio.gather(*(_stream(client, prompt, max_tokens) for prompt in prompts))


async def _stream(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> Answer:
    body = {"model": "model", "prompt": prompt, "temperature": 0.0, "max_tokens": max_tokens}
    body |= {"stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    finish_reason, began, first, last = None, time.monotonic(), 0.0, 0.0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line.removeprefix("data: "))
            if "error" in told:
                raise ServerError(f"a request failed: {told['error']}")
            for part in told["choices"]:
                if part.get("token_ids"):
                    last = time.monotonic() - began
                    first = first or last
                    token_ids += part["token_ids"]
                finish_reason = part.get("finish_reason") or finish_reason
    return Answer(token_ids, finish_reason, first, last)


def check(label: str, answers: Sequence[Answer], ended: Mapping[str, int], max_tokens: int) -> None:
    """See that nothing was lost.

    Args:
        label: of the method.
        answers: of all requests.
        ended: requests, by the server's reason, meanwhile.
        max_tokens: of an answer.

    Raises:
        ServerError: if something was.
    """
    for number, one in enumerate(answers):
        whole = len(one.token_ids) == max_tokens or (one.finish_reason == "stop" and one.token_ids)
        if one.finish_reason not in ("stop", "length") or not whole:
            raise ServerError(
                f"{label}: request {number} got {len(one.token_ids)} tokens, ended by {one.finish_reason}"
            )
    in_order = {reason: n for reason, n in ended.items() if n}
    if sum(in_order.values()) != len(answers) or set(in_order) - {"stop", "length"}:
        raise ServerError(f"{label}: the server ended {in_order}, and {len(answers)} requests were sent")


def judged(
    url: str, prompts: Sequence[list[int]], answers: Mapping[str, Sequence[Answer]], bound: float
) -> dict[str, dict[str, Any]]:
    """Verdicts of every method's answers against those of ``none``, whose server is at `url`."""
    found = {}
    for label, ours in answers.items():
        if label == "none":
            continue
        pairs = zip(prompts, answers["none"], ours, strict=True)
        differences = [
            exactness.first_difference(prompt, plain.token_ids, one.token_ids) for prompt, plain, one in pairs
        ]
        gaps = {one: _gap(url, one) for one in differences if one is not None}
        found[label] = exactness.verdict(differences, gaps, bound)
    return found


def _gap(url: str, difference: exactness.Difference) -> float:
    """As `benchmarks.exactness.gaps`, asked of a server."""
    if None in difference.tokens:
        return float("inf")
    widest = 0.0
    for token in difference.tokens:
        body = {"model": "model", "prompt": [*difference.shared, token], "max_tokens": 1, "prompt_logprobs": 1}
        answer = httpx.post(f"{url}/v1/completions", json={**body, "temperature": 0.0}, timeout=600).json()
        row = answer["choices"][0]["prompt_logprobs"][-1]
        widest = max(widest, max(of["logprob"] for of in row.values()) - row[str(token)]["logprob"])
    return widest


def num_preempted(url: str) -> int:
    """How often requests had to give their blocks back, from ``/metrics``."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_preemptions_total")))


def figures(label: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows: tokens per second of all, and percentiles over requests in ms."""
    tokens, first, last = np.array(run["rows"], float).T
    per_token = 1000 * (last - first)[tokens > 1] / (tokens[tokens > 1] - 1)
    return {
        "method": label,
        "output_throughput": round(float(tokens.sum()) / run["seconds"], 2),
        "ttft_ms": _percentiles(1000 * first),
        "tpot_ms": _percentiles(per_token),
        "preemptions": run["preemptions"],
        "accepted": run["accepted_tokens"] / run["draft_tokens"] if run["draft_tokens"] else None,
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {
        f"p{at}": round(float(value), 1)
        for at, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def report(result: Mapping[str, Any]) -> str:
    """All of it as text."""
    conditions = result["metadata"]["conditions"]
    rows = [
        [of["method"], results.number(of["output_throughput"], 1)]
        + [" / ".join(f"{value:.0f}" for value in of[key].values()) for key in ("ttft_ms", "tpot_ms")]
        + [str(of["preemptions"]), "-" if of["accepted"] is None else f"{100 * of['accepted']:.0f} %"]
        for of in result["figures"]
    ]
    exact = result["exactness"]["aasd strict"]
    return "\n\n".join(
        (
            results.heading(result),
            f"{conditions['model']}, {conditions['dtype']}: {conditions['requests']} requests at once want "
            f"{result['wanted_tokens']} tokens of KV cache, and it holds {result['kv_cache_tokens']}. Every request was "
            f"answered. aasd strict: {exact['num_different']} of {exact['num_answers']} answers differ from none's, "
            f"{exact['num_wider']} of them beyond a tie.",
            "Milliseconds, as p50 / p95 / p99 over requests.",
            results.table(["method", "tokens/s", "TTFT", "TPOT", "preemptions", "accepted"], rows),
        )
    )


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, out="load.json")
    traces.add_arguments(parser)
    parser.set_defaults(dtype="float32", max_tokens=64, max_prompt_tokens=128)
    parser.add_argument("--requests", type=int, default=64, help="at once (default %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=64, help=f"of {BLOCK_SIZE} tokens in the KV cache (default %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
