"""The tables of a run of `benchmarks.serving`."""

from collections.abc import Mapping
from typing import Any

from benchmarks import results


def report(result: Mapping[str, Any]) -> str:
    """All of it as text."""
    conditions = result["metadata"]["conditions"]
    first = next(iter(result["methods"]))
    return "\n\n".join(
        (
            results.heading(result),
            f"{conditions['model']}, vllm serve under vllm bench serve, {conditions['requests']} requests per rate, "
            f"greedy, up to {conditions['max_tokens']} tokens. Every request was answered.",
            "Milliseconds, median and 95th percentile; MAL, and draft tokens accepted.",
            times_table(result),
            f"As a ratio to {first} at the same rate (above 1 is faster), with a 95 % bootstrap interval over "
            "requests; answers equal to its (others batch, and round, differently, or aren't strict).",
            ratio_table(result),
        )
    )


def times_table(result: Mapping[str, Any]) -> str:
    """Throughput, times and acceptance by rate and method."""
    rows = []
    for of in result["figures"]:
        times = [f"{of[key]['median']:.0f} / {of[key]['p95']:.0f}" for key in ("ttft_ms", "tpot_ms", "latency_ms")]
        accepted = "-" if of["accepted"] is None else f"{100 * of['accepted']:.0f} %"
        rows.append([f"{of['rate']:g}", of["method"], results.number(of["output_throughput"], 1), *times,
                     results.number(of["mal"]), accepted])  # fmt: skip
    header = ["requests/s", "method", "tokens/s", "TTFT", "TPOT", "whole answer", "MAL", "accepted"]
    return results.table(header, _by_rate(rows))


def ratio_table(result: Mapping[str, Any]) -> str:
    """Ratios to the first method."""
    first = next(iter(result["methods"]))
    rows = [
        [f"{of['rate']:g}", of["method"]]
        + [results.interval(of[key]) for key in ("ttft_ratio", "tpot_ratio", "latency_ratio")]
        + [f"{100 * of['equal']:.0f} %"]
        for of in result["figures"]
        if of["method"] != first
    ]
    return results.table(["requests/s", "method", "TTFT", "TPOT", "whole answer", "equal answers"], _by_rate(rows))


def _by_rate(rows: list[list[str]]) -> list[list[str]]:
    return sorted(rows, key=lambda row: float(row[0]))
