"""Serving: the production server under ``vllm bench serve``, with requests that arrive at given rates.

    python -m benchmarks.serving --data question.jsonl hotpotqa.jsonl --builtin
    python -m benchmarks.serving --builtin --methods none aasd --rates 0.5 2 --requests 20

``vllm serve`` is started once per method, at its own defaults, prefix caching included. For each rate vLLM's own
client sends prompts of all categories mixed, greedily, at random times (a Poisson process, the same for every
method). Each rate has prompts of its own, so no method is asked anything twice. Methods are measured one after the
other, so a drift of the machine isn't cancelled as in `benchmarks.end_to_end`, which also judges exactness.

Before any figure is written: every request must have been answered with at least one token and without an error, the
server must have ended exactly those, and its speculative counters must be the client's.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import methods, results, resume, serving_report, traces
from benchmarks.engine import progress_line
from benchmarks.methods import METHODS
from benchmarks.server import Server, ServerError, SpecCounters, vllm_command
from vllm_aasd.tuning import statistics
from vllm_aasd.tuning.json_lines import DataError
from vllm_aasd.tuning.prompts import load_tokenizer
from vllm_aasd.tuning.tasks import Task

WARM_UP_REQUESTS = 4

PER_REQUEST = ("input_lens", "output_lens", "ttfts", "latencies")
"""Of ``vllm bench serve --save-detailed``: tokens, and seconds."""


def main() -> None:
    """Measure every method at every rate, write the result, print its tables."""
    arguments = _arguments()
    if arguments.show:
        print(serving_report.report(results.read(arguments.show)))
        return
    results.require_model(arguments)
    try:
        methods.require_pandas()
        result = measure(arguments)
    except (DataError, OSError, ValueError, ServerError, methods.MissingPackage) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was measured is kept for --resume")
    results.write(arguments.out, result)
    print(serving_report.report(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what isn't known yet; returns the result."""
    chosen = methods.chosen(methods.without_missing(arguments.methods), arguments.aasd)
    tokenizer = load_tokenizer(arguments.model)
    batches = prompts_by_rate(traces.measured_tasks(arguments), tokenizer, arguments)
    metadata = results.metadata(
        **results.conditions(arguments, "resume"),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        sampling="greedy",
        has_prior=methods.has_prior(arguments.model, chosen),
    )
    settings = [metadata["commit"], metadata["versions"], metadata["conditions"], chosen, batches]
    store = resume.Store(arguments.out.with_suffix(".unfinished"), settings)
    found = store.load() if arguments.resume else {}
    total, began = len(chosen) * len(batches), time.monotonic()
    num_known = len(found)
    for label, speculative_config in chosen.items():
        if all((label, rate) in found for rate in batches):
            continue
        extra = [] if speculative_config is None else ["--speculative-config", json.dumps(speculative_config)]
        extra += ["--max-model-len", str(arguments.max_prompt_tokens + arguments.max_tokens + 64)]
        extra += ["--dtype", arguments.dtype]
        with Server(arguments.model, extra, lambda text, label=label: progress_line(f"{label}: {text}")) as server:
            run_client(server, arguments, list(batches.values())[0][:WARM_UP_REQUESTS], float("inf"), 8)
            for rate, prompts in batches.items():
                if (label, rate) in found:
                    continue
                progress_line(f"{label}: {len(prompts)} requests at {rate:g} a second")
                found[label, rate] = measured(server, arguments, prompts, rate)
                store.save(found)
                left = (time.monotonic() - began) / (len(found) - num_known) * (total - len(found))
                print(f"{label}, {rate:g}/s: done; about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    progress_line("")
    store.remove()
    runs = [{"method": label, "rate": rate, **run} for (label, rate), run in found.items()]
    return {"metadata": metadata, "methods": chosen, "runs": runs, "figures": figures(runs, list(chosen))}


def prompts_by_rate(tasks: Sequence[Task], tokenizer: Any, arguments: argparse.Namespace) -> dict[float, list[str]]:
    """Prompts for each rate, none of them for two: the categories in turn, too long ones left out.

    Raises:
        DataError: if there are too few.
    """
    by_category: dict[str, list[str]] = {}
    for task in tasks:
        text = task.raw if tokenizer.chat_template is None and task.raw else task.text
        # What a chat template adds is far less than the slack that the server has.
        if len(tokenizer.encode(text)) <= arguments.max_prompt_tokens:
            by_category.setdefault(task.category, []).append(text)
    mixed = [text for texts in itertools.zip_longest(*by_category.values()) for text in texts if text is not None]
    needed = arguments.requests * len(arguments.rates)
    if len(mixed) < needed:
        raise DataError(
            f"{len(mixed)} prompts are too few for {len(arguments.rates)} rates of {arguments.requests} requests: "
            "name more with --data, raise --limit, or lower --requests"
        )
    return {
        rate: mixed[number * arguments.requests : (number + 1) * arguments.requests]
        for number, rate in enumerate(arguments.rates)
    }


def measured(server: Server, arguments: argparse.Namespace, prompts: Sequence[str], rate: float) -> dict[str, Any]:
    """One run of vLLM's client: its figures that are kept, checked.

    Raises:
        ServerError: if anything was lost.
    """
    counters, finished = server.spec_counters(), server.num_finished()
    report = run_client(server, arguments, prompts, rate, arguments.max_tokens)
    counted = server.spec_counters().since(counters)
    ended = {reason: n - finished.get(reason, 0) for reason, n in server.num_finished().items()}
    check(report, len(prompts), counted, ended)
    decoded = sum(n - 1 for n in report["output_lens"])
    return {
        "seconds": round(report["duration"], 3),
        "request_throughput": report["request_throughput"],
        "output_throughput": report["output_throughput"],
        "max_concurrent_requests": report["max_concurrent_requests"],
        "per_position_acceptance": report.get("spec_decode_per_position_acceptance_rates", []),
        # Tokens behind each answer's first by decode steps; a step emits what it accepts and one token more.
        "mal": decoded / max(decoded - counted.accepted_tokens, 1),
        **counted._asdict(),
        "rows": [list(row) for row in zip(*(report[key] for key in PER_REQUEST), strict=True)],
        "texts": report["generated_texts"],
    }


def check(report: Mapping[str, Any], num_sent: int, counted: SpecCounters, ended: Mapping[str, int]) -> None:
    """See that nothing was lost and that both ends count alike.

    Args:
        report: of ``vllm bench serve``.
        num_sent: requests.
        counted: by the server meanwhile.
        ended: requests, by the server's reason, meanwhile.

    Raises:
        ServerError: if not.
    """
    errors = [error for error in report["errors"] if error]
    if report["completed"] != num_sent or report["failed"] or errors:
        raise ServerError(f"{report['completed']} of {num_sent} requests were answered: {errors[:1]}")
    if min(report["output_lens"]) < 1:
        raise ServerError("an answer is empty")
    in_order = {reason: n for reason, n in ended.items() if n}
    if sum(in_order.values()) != num_sent or set(in_order) - {"stop", "length"}:
        raise ServerError(f"the server ended {in_order}, and {num_sent} requests were sent")
    client = tuple(report.get(f"spec_decode_{key}", 0) for key in ("num_drafts", "draft_tokens", "accepted_tokens"))
    if client != tuple(counted):
        raise ServerError(f"the client counted {client}, and the server {tuple(counted)}")


def run_client(
    server: Server, arguments: argparse.Namespace, prompts: Sequence[str], rate: float, max_tokens: int
) -> dict[str, Any]:
    """``vllm bench serve`` with these prompts, in this order; returns what it wrote.

    Raises:
        ServerError: if it fails; the text holds the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        command = [str(vllm_command()), "bench", "serve", *client_arguments(arguments)]
        command += ["--base-url", server.url, "--dataset-path", str(path), "--num-prompts", str(len(prompts))]
        command += ["--custom-output-len", str(max_tokens), "--request-rate", str(rate)]
        command += ["--result-dir", folder, "--result-filename", "report.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = Path(folder, "report.json")
        if done.returncode or not report.exists():
            said = (done.stdout + done.stderr)[-3000:]
            raise ServerError(f"vllm bench serve ended with {done.returncode}\n{said}\n{server.log_tail()}")
        return json.loads(report.read_text())


def client_arguments(arguments: argparse.Namespace) -> list[str]:
    """Those that don't change from run to run. It must ask nothing before: a prompt is asked once."""
    chat = load_tokenizer(arguments.model).chat_template is not None
    kind = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"] if chat else ["--backend", "openai"]
    return [
        *kind,
        *("--model", "model", "--tokenizer", arguments.model, "--dataset-name", "custom"),
        *("--skip-chat-template", "--disable-shuffle", "--no-oversample"),
        *("--temperature", "0", "--seed", "0", "--ready-check-timeout-sec", "0"),
        *("--disable-tqdm", "--save-result", "--save-detailed"),
    ]


def figures(runs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """What a table shows: times in ms, and ratios to the first method at the same rate.

    A ratio is above 1 where the method is faster. Its interval is a 95 % bootstrap over requests, paired; requests
    that wait for each other make it too narrow.
    """
    by_place = {(run["method"], run["rate"]): run for run in runs}
    found = []
    for run in runs:
        base = by_place[labels[0], run["rate"]]
        ours, theirs = columns(run), columns(base)
        equal = [one == other for one, other in zip(run["texts"], base["texts"], strict=True)]
        found.append(
            {
                "method": run["method"],
                "rate": run["rate"],
                "output_throughput": run["output_throughput"],
                **{f"{key}_ms": _percentiles(1000 * ours[key]) for key in ("ttft", "tpot", "latency")},
                "mal": run["mal"],
                "accepted": run["accepted_tokens"] / run["draft_tokens"] if run["draft_tokens"] else None,
                "ttft_ratio": _ratio(theirs["ttft"], ours["ttft"]),
                "tpot_ratio": _ratio(theirs["tpot"], ours["tpot"]),
                "latency_ratio": _ratio(theirs["latency"], ours["latency"]),
                "equal": float(np.mean(equal)),
            }
        )
    return found


def columns(run: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Seconds by request: to the first token, per token behind it (0 where there is none), to the last."""
    _, tokens, first, latency = (np.array(column, float) for column in zip(*run["rows"], strict=True))
    return {"ttft": first, "tpot": (latency - first) / np.maximum(tokens - 1, 1), "latency": latency}


def _ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, float | None]:
    drawn = statistics.draws(len(top), np.random.default_rng(0))
    one_round = np.ones((statistics.RESAMPLES, 1))
    return statistics.with_interval(statistics.crossed_ratio(top[:, None], bottom[:, None], drawn, one_round))


def _percentiles(values: np.ndarray) -> dict[str, float]:
    median, p95 = np.percentile(values, (50, 95))
    return {"median": round(float(median), 2), "p95": round(float(p95), 2)}


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, out="serving.json")
    traces.add_arguments(parser)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is compared with")
    add(
        "--aasd",
        action="append",
        default=[],
        type=methods.settings,
        metavar="JSON",
        help="also aasd with these settings",
    )
    add("--rates", type=_rate, nargs="+", default=[0.25, 0.5, 1.0], help="requests a second (default %(default)s)")
    add("--requests", type=int, default=40, help="per rate (default %(default)s)")
    add("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    return parser.parse_args()


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it takes a number above 0")
    return value


if __name__ == "__main__":
    main()
