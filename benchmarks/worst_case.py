"""Worst case: what a draft takes on contexts made to be as much work as they can be, beside ordinary text.

    python -m benchmarks.worst_case --data question.jsonl

One request at a time, whose context (`benchmarks.adversarial`, or real text as in `benchmarks.drafter_time`) grows by two
tokens before every draft. The same steps are run several times, the contexts in turn, and each step counts as its fastest
run: what is left is what the step's work takes, without what the machine did besides. *Warm* is one step right after the
other; *cold* has a buffer of 64 MiB read between them, as a model's weights are in serving. Then, on real text: a request
that grows from 256 tokens to the longest context, in which the index's tables grow too; the index of a fresh prompt, by
the token; what a request's index takes; and how much memory a process holds while requests come and go.
"""

import argparse
import gc
import pathlib
import time
import tracemalloc
from collections.abc import Mapping

import numpy as np
import psutil

from benchmarks import adversarial, results
from benchmarks.drafter_time import NEW_TOKENS, NUM_DRAFT_TOKENS, growing, made_up_alignment, metadata, real_tokens
from vllm_aasd.drafting.drafter import NUM_ORDERS, AlignmentView, Drafter
from vllm_aasd.drafting.suffix_index import SuffixIndex

TYPICAL = "real text"

MIN_SURVIVAL = 0.02
"""The default of the settings."""

SHORTEST = 256
"""Tokens that the growing request begins with."""

_COLD_BYTES = 64 << 20

_FIGURES = ("median", "p99", "slowest", "per_draft_token")


def main() -> None:
    """Measure, write the result, print its tables."""
    parser = results.arguments(__doc__, out="worst_case.json")
    results.add_model_argument(parser)
    parser.add_argument("--data", type=pathlib.Path, help="questions to make real text of; Python's sources by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="drafts per context (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of the same steps, the contexts in turn (default %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=2000, help="that come and go (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    results.require_model(arguments)
    needed = max(arguments.lengths) + NEW_TOKENS * arguments.steps
    text, vocab_size, source = real_tokens(arguments, needed)
    rows = []
    for length in arguments.lengths:
        count = length + NEW_TOKENS * arguments.steps
        contexts = {TYPICAL: text[:count]}
        contexts |= {name: make(count, vocab_size) for name, make in adversarial.CONTEXTS.items()}
        found = {
            kind: all_step_times(contexts, length, arguments, vocab_size, kind == "cold") for kind in ("warm", "cold")
        }
        for name, tokens in contexts.items():
            row = {"context_tokens": length, "context": name}
            for kind, of in found.items():
                times, drafted = of[name]
                row[kind] = {**summary(times), "per_draft_token": round(float(times.sum() / max(drafted.sum(), 1)), 2)}
            row |= {"draft_tokens": round(float(np.mean(drafted)), 2), "index": time_index(tokens, length)}
            rows.append(row)
            print(*table_row(row), flush=True)
    num_steps = (max(arguments.lengths) - SHORTEST) // NEW_TOKENS
    view = made_up_alignment(text, vocab_size)
    runs = [step_times(text, SHORTEST, num_steps, view, vocab_size)[0] for _ in range(arguments.repeats)]
    result = {
        "metadata": metadata(model=arguments.model, text=source, min_survival=MIN_SURVIVAL, repeats=arguments.repeats),
        "rows": rows,
        "growing": {"from": SHORTEST, "to": max(arguments.lengths), **summary(np.min(runs, axis=0))},
        "worst": [worst(rows, length) for length in arguments.lengths],
        "churn": churn(text, arguments.requests, vocab_size),
    }
    results.write(arguments.out, result)
    print(tables(result))


def all_step_times(
    contexts: Mapping[str, np.ndarray], length: int, arguments: argparse.Namespace, vocab_size: int, is_cold: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`step_times` of each context, each step as its fastest run.

    The contexts take turns, so that what slows the machine for seconds slows none of them alone.
    """
    views = {name: made_up_alignment(tokens, vocab_size) for name, tokens in contexts.items()}
    runs = [
        {
            name: step_times(tokens, length, arguments.steps, views[name], vocab_size, is_cold)
            for name, tokens in contexts.items()
        }
        for _ in range(arguments.repeats)
    ]
    return {name: (np.min([run[name][0] for run in runs], axis=0), runs[0][name][1]) for name in contexts}


def step_times(
    tokens: np.ndarray, length: int, num_steps: int, view: AlignmentView, vocab_size: int, is_cold: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draft for a request that has ``length`` tokens at first.

    Returns:
        microseconds: ``[num_steps]``; taking in a step's new tokens is included.
        draft_tokens: ``[num_steps]``.
    """
    buffer = np.ones(_COLD_BYTES // 8 if is_cold else 0)
    drafter = Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL)
    times, drafted = np.empty(num_steps), np.zeros(num_steps, np.int64)
    gc.disable()
    try:
        drafter.draft("timed", tokens[:length], view, 0)
        for step, context in enumerate(growing(tokens, length, num_steps)):
            buffer.sum()
            began = time.perf_counter_ns()
            drafted[step] = len(drafter.draft("timed", context, view, NUM_DRAFT_TOKENS)[0])
            times[step] = time.perf_counter_ns() - began
    finally:
        gc.enable()
    return times / 1000, drafted


def summary(times: np.ndarray) -> dict[str, float]:
    """Microseconds of the steps of a run."""
    median, p99, slowest = np.percentile(times, (50, 99, 100))
    return {name: round(float(value), 2) for name, value in zip(("median", "p99", "slowest"), (median, p99, slowest))}


def time_index(tokens: np.ndarray, length: int, repeats: int = 5) -> dict[str, float]:
    """Take in a fresh prompt of ``length`` tokens: nanoseconds of the fastest run, and bytes, each by the token."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        index = SuffixIndex(NUM_ORDERS, NUM_DRAFT_TOKENS, length)
        index.extend(tokens[:length])
        times.append(time.perf_counter_ns() - began)
    return {"ns_per_token": round(min(times) / length, 1), "bytes_per_token": round(index.nbytes / length, 1)}


def worst(rows: list[dict], length: int) -> dict:
    """The context whose steps take longest, and what they take by the time of ordinary text."""
    of_length = {row["context"]: row for row in rows if row["context_tokens"] == length}
    typical = of_length[TYPICAL]
    found = {"context_tokens": length}
    for kind in ("warm", "cold"):
        name = max(of_length, key=lambda name, kind=kind: of_length[name][kind]["median"])
        slowest = max(of_length, key=lambda name, kind=kind: of_length[name][kind]["p99"])
        found[kind] = {
            "context": name,
            "ratio": round(of_length[name][kind]["median"] / typical[kind]["median"], 2),
            "context_by_p99": slowest,
            "ratio_of_p99": round(of_length[slowest][kind]["p99"] / typical[kind]["p99"], 2),
        }
    return found


def churn(tokens: np.ndarray, num_requests: int, vocab_size: int) -> dict:
    """What a process holds while requests with contexts of 100 tokens to all come, decode a little and end.

    Eight run at a time. MiB of the process after a tenth of the requests, at the end, and at most in between, each with
    eight running. Of what is allocated by Python and numpy, the most, and what is left when all have ended, in bytes
    beyond the beginning: of a tenth of the requests, for it is slow to trace.
    """
    drafter = Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL)
    view = made_up_alignment(tokens, vocab_size)
    rng = np.random.default_rng(4)
    # Log-uniform: most requests are short, and some are as long as can be.
    lengths = np.exp(rng.uniform(np.log(100), np.log(len(tokens) - 20), num_requests)).astype(int).tolist()
    running: list[str] = []
    process = psutil.Process()
    held = np.zeros(num_requests)

    def run(number: int, length: int) -> None:
        running.append(str(number))
        for step in range(5):
            drafter.draft(str(number), tokens[: length + NEW_TOKENS * step], view, NUM_DRAFT_TOKENS)
        if len(running) == 8:
            drafter.forget([running.pop(0)])

    for number, length in enumerate(lengths):
        run(number, length)
        held[number] = process.memory_info().rss / 2**20
    drafter.forget(running)
    running.clear()
    tenth = num_requests // 10
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number, length in enumerate(lengths[:tenth]):
        run(number, length)
    drafter.forget(running)
    running.clear()
    after, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "requests": num_requests,
        "mib_after_a_tenth": round(held[tenth - 1], 1),
        "mib_at_the_end": round(held[-1], 1),
        "most_mib_since": round(held[tenth:].max(), 1),
        "traced_most_bytes": most - before,
        "traced_bytes_left": after - before,
        "requests_left": drafter.num_requests,
    }


def table_row(row: dict) -> list[str]:
    """A row of the table."""
    times = [f"{row[kind][name]:.1f}" for kind in ("warm", "cold") for name in _FIGURES]
    index = row["index"]
    return [
        str(row["context_tokens"]), row["context"], *times, f"{row['draft_tokens']:.2f}", f"{index['ns_per_token']:.0f}",
        f"{index['bytes_per_token']:.0f}",
    ]  # fmt: skip


def tables(result: dict) -> str:
    """The result as text."""
    times = [f"{kind}, us: {name.replace('_', ' ')}" for kind in ("warm", "cold") for name in _FIGURES]
    header = ["context", "of", *times, "drafted", "index, ns/token", "index, bytes/token"]
    lines = [
        f"{found['context_tokens']} tokens, {kind}: worst is {found[kind]['context']} with {found[kind]['ratio']:.2f} times "
        f"the median of real text; by p99 {found[kind]['context_by_p99']} with {found[kind]['ratio_of_p99']:.2f}"
        for found in result["worst"]
        for kind in ("warm", "cold")
    ]
    grown = result["growing"]
    lines += [
        f"growing from {grown['from']} to {grown['to']} tokens: median {grown['median']}, p99 {grown['p99']}, slowest "
        f"{grown['slowest']} us",
        "; ".join(f"{name} {value}" for name, value in result["churn"].items()),
    ]
    rows = [table_row(row) for row in result["rows"]]
    return "\n".join((results.heading(result), "", results.table(header, rows), "", *lines))


if __name__ == "__main__":
    main()
