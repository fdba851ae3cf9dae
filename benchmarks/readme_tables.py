"""The README's tables, each from one result."""

from collections.abc import Mapping
from typing import Any

from benchmarks import comparison, projection_report, results
from benchmarks.comparison import MEAN
from benchmarks.exactness import failed

_HEADINGS = {
    "mt_bench": "MT-bench",
    "qa": "QA",
    "math_reasoning": "maths",
    "rag": "RAG",
    "hotpotqa": "HotpotQA",
    "code_infile": "code",
    "code_crossfile": "code, two files",
}
_METHODS = {
    "none": "no speculation",
    "ngram": "vLLM `ngram` (1 to 3 tokens, drafts of 5)",
    "suffix": "vLLM `suffix`",
}
_STRICT = ("aasd_verification", "strict")


def tokens_per_step(result: Mapping[str, Any]) -> str:
    """Mean acceptance length by category, one request at a time; drafted tokens per step; none of inexact runs."""
    if failed(result["exactness"]):
        return _inexact(result)
    by_category = next(iter(result["figures"].values()))
    rows = []
    for label, config in result["methods"].items():
        found = [of[label] for category, of in by_category.items() if category != MEAN]
        mean = by_category[MEAN][label]
        rows.append(
            [method(label, config), *(results.number(_value(of["mal"])) for of in found)]
            + [results.number(mean["mal"]), results.number(mean["drafted_per_step"], 1)]
        )
    headings = [_HEADINGS.get(category, category) for category in by_category if category != MEAN]
    return results.table(["tokens per step of the target", *headings, "mean", "drafted per step"], rows)


def speed(result: Mapping[str, Any]) -> str:
    """Time per output token and tokens a second, as ratios to the first method; none of inexact runs.

    Each by method and concurrency: the mean over categories, its interval, and the lowest category.
    """
    if failed(result["exactness"]):
        return _inexact(result)
    figures = comparison.figures(result)
    first, *others = result["methods"]
    counts = [f"{number} at once" for number in figures]
    ratios = {"tpot_ratio": "per token behind the first", "tokens_per_s_ratio": "tokens/s, with prefill"}
    tables = []
    for key, name in ratios.items():
        rows = [
            [method(label, result["methods"][label])] + [_with_lowest(of, label, key) for of in figures.values()]
            for label in others
        ]
        heading = f"{name}, times as fast as {method(first, result['methods'][first])}"
        tables.append(results.table([heading, *counts], rows))
    return "\n\n".join(tables)


def ablation(result: Mapping[str, Any]) -> str:
    """What each part adds: MAL and speed at the prices of a draft token."""
    rows = []
    for name, by_price in result["stages"].items():
        found = list(by_price.values())
        rows.append(
            [name, " / ".join(results.number(of["mal"]["value"]) for of in found)]
            + [" / ".join(results.number(of["drafted_per_step"], 1) for of in found)]
            + [results.interval(of["speed"]) for of in found]
        )
    found = next(iter(result["stages"].values()))
    prices = [f"speed where a draft token costs {float(price):.0%} of a step" for price in found]
    return results.table(["drafter", "MAL", "drafted/step", *prices], rows)


def calibration(result: Mapping[str, Any]) -> str:
    """Predicted survival and observed acceptance by category: their means, and the expected calibration error."""
    rows = []
    for category, of in result["calibration"]["reliability"].items():
        counts = [bin_["count"] for bin_ in of["bins"]]
        means = [
            sum(count * bin_[key] for count, bin_ in zip(counts, of["bins"], strict=True)) / sum(counts)
            for key in ("predicted", "accepted")
        ]
        heading = _HEADINGS.get(category, category)
        rows.append([heading, str(sum(counts)), *map(results.number, means), results.number(of["ece"], 3)])
    header = ["prompts", "draft tokens", "predicted survival", "accepted", "expected calibration error"]
    return results.table(header, rows)


def drafter_time(result: Mapping[str, Any]) -> str:
    """Microseconds of a draft by the length of the context."""
    kinds = ("aligned", "without_alignment", "vllm_ngram")
    rows = [
        [str(row["context_tokens"]), *(f"{row[kind]['median']:.0f} / {row[kind]['p95']:.0f}" for kind in kinds)]
        + [f"{row['index_build']['median'] / 1000:.2f}", f"{row['index_bytes'] / 2**20:.2f}"]
        for row in result["rows"]
    ]
    header = ["tokens of context", "aasd, µs (median / p95)", "aasd, nothing stored, µs", "vLLM `ngram`, µs"]
    return results.table([*header, "index of a prompt, ms", "MiB"], rows)


def worst_case(result: Mapping[str, Any]) -> str:
    """Microseconds of a draft at the longest context, by what it is made of."""
    longest = max(row["context_tokens"] for row in result["rows"])
    rows = [
        [row["context"]]
        + [f"{row[kind]['median']:.0f} / {row[kind]['p99']:.0f}" for kind in ("warm", "cold")]
        + [results.number(row["draft_tokens"], 1), results.number(row["index"]["bytes_per_token"], 0)]
        for row in result["rows"]
        if row["context_tokens"] == longest
    ]
    header = [f"{longest} tokens of", "warm caches, µs (median / p99)", "cold caches, µs", "drafted"]
    return results.table([*header, "index, bytes a token"], rows)


def verifier_time(result: Mapping[str, Any]) -> str:
    """Microseconds of a step's verification, where every draft token is a near rival of the target's choice."""
    kinds = [key for key, value in result["rows"][0].items() if isinstance(value, Mapping)]
    rows = [
        [str(row["vocab_size"]), str(row["batch_size"]), *(f"{row[kind]['median']:.0f}" for kind in kinds)]
        for row in result["rows"]
        if row["drafts"] == "rival"
    ]
    return results.table(["vocabulary", "requests", *(_stock(kind) for kind in kinds)], rows)


def prefill(result: Mapping[str, Any]) -> str:
    """Time to the first token by the prompt's length, and what of it is overhead."""
    figures = result["figures"]
    rows = []
    for label, config in result["methods"].items():
        cells = []
        for of in figures.values():
            overhead = of[label]["overhead_percent"]
            spread = f", {overhead['value']:+.1f} % [{overhead['low']:.1f}, {overhead['high']:.1f}]"
            cells.append(f"{of[label]['median_ms']:.1f}" + (spread if rows else ""))
        rows.append([method(label, config), *cells])
    return results.table(["ms to the first token", *(f"{length} tokens of prompt" for length in figures)], rows)


def serving(result: Mapping[str, Any]) -> str:
    """The real server by arrival rate and method: times, tokens per step, and the ratio of time per token."""
    first = next(iter(result["methods"]))
    rows = []
    for of in sorted(result["figures"], key=lambda of: of["rate"]):
        times = [f"{of[key]['median']:.0f} / {of[key]['p95']:.0f}" for key in ("ttft_ms", "tpot_ms", "latency_ms")]
        ratio = "1" if of["method"] == first else results.interval(of["tpot_ratio"])
        rows.append([f"{of['rate']:g}", method(of["method"], result["methods"][of["method"]])]
                    + [results.number(of["output_throughput"], 1), *times, results.number(of["mal"]), ratio])  # fmt: skip
    header = ["requests/s", "method", "tokens/s", "first token, ms (median / p95)", "per token, ms", "whole answer, ms"]
    return results.table([*header, "tokens per step", "speed-up of tokens behind the first"], rows)


def load(result: Mapping[str, Any]) -> str:
    """More requests at once than the KV cache holds: throughput, percentiles, preemptions."""
    rows = [
        [method(of["method"], result["methods"][of["method"]]), results.number(of["output_throughput"], 1)]
        + [" / ".join(f"{value:.0f}" for value in of[key].values()) for key in ("ttft_ms", "tpot_ms")]
        + [str(of["preemptions"]), "-" if of["accepted"] is None else f"{of['accepted']:.0%}"]
        for of in result["figures"]
    ]
    header = ["method", "tokens/s", "first token, ms (p50 / p95 / p99)", "per token, ms", "preemptions", "accepted"]
    return results.table(header, rows)


def projection(result: Mapping[str, Any]) -> str:
    """Projected speed-ups of decoding; where the requests don't fit into memory, in brackets."""
    rows = []
    for target, machine in projection_report.places(result):
        chosen = projection_report.select(result, target=target, machine=machine)
        for label in chosen[0]["methods"]:
            cells = [results.number(row["methods"][label]["speed_up"]) for row in chosen]
            cells = [cell if row["fits"] else f"({cell})" for cell, row in zip(cells, chosen, strict=True)]
            rows.append([f"{target}, {machine}", label, *cells])
    return results.table(["**projected**, not measured", "method", *(str(row["batch"]) for row in chosen)], rows)


def kernels(result: Mapping[str, Any]) -> str:
    """Bytes that each job moves, by one read of all logits."""
    rows = [[row["job"], results.number(row["over_least"], 3)] for row in result["traffic"]]
    return results.table(["one step of", "bytes moved, by one read of all logits"], rows)


def method(label: str, speculative_config: Mapping[str, Any] | None) -> str:
    """How the README calls a method."""
    if label in _METHODS:
        return _METHODS[label]
    settings = dict(speculative_config)
    words = []
    settings.pop("method")
    if settings.get(_STRICT[0]) == _STRICT[1]:
        words.append("strict")
        settings.pop(_STRICT[0])
    if settings.pop("aasd_alignment", None) is True:
        words.append("predictions at prompt positions too")
    words += [f"`{key}` {value}" for key, value in settings.items()]
    return ", ".join(["aasd", *words])


def _inexact(result: Mapping[str, Any]) -> str:
    return f"No figures: {', '.join(failed(result['exactness']))} didn't give the answers that it promises."


def _stock(kind: str) -> str:
    return "vLLM's own, µs" if kind == "vllm" else f"{kind}, µs"


def _value(figure: Mapping[str, float] | None) -> float | None:
    return None if figure is None else figure["value"]


def _with_lowest(by_category: Mapping[str, Any], label: str, key: str) -> str:
    lowest, category = min(
        (of[label][key]["value"], category) for category, of in by_category.items() if category != MEAN
    )
    return f"{_spread(by_category[MEAN][label][key])}; {_HEADINGS.get(category, category)} {results.number(lowest)}"


def _spread(figure: Mapping[str, float]) -> str:
    return results.number(figure["value"]) if figure["low"] == figure["high"] else results.interval(figure)
