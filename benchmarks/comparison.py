"""The figures of an end-to-end comparison, from its rows: by concurrency, category and method.

Ratios are to one method, the base, and above 1 where the method is faster. They are paired: numerator and
denominator stand on the same prompts in the same rounds, and a resample draws prompts and rounds for both.
The mean over categories is the geometric one; a resample of it draws prompts within each category, and one
set of rounds for all, for a round's trouble hits all categories.

``tokens_per_s_ratio`` compares answers as long as the base's. An answer that parts from the base's at a near tie, or
is sampled, can be much shorter or longer; and since the prompt's time is shared among its tokens, tokens/s as they
were would tell its length more than the method's speed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import steps
from vllm_aasd.tuning import statistics

MEAN = "geometric mean"

RATIOS = ("tokens_per_s", "tpot")
"""What methods are compared by."""

REMEMBERS = 1.05
"""How much better the last round's MAL must be than the first's for a method to be called out."""


def figures(result: Mapping[str, Any], base: str | None = None) -> dict[str, dict[str, dict[str, dict]]]:
    """All figures of a result, by concurrency (as text), category or `MEAN`, and method.

    Args:
        result: as `benchmarks.end_to_end` writes it.
        base: the method that ratios are to; None for the first.
    """
    columns = result["columns"]
    labels = list(result["methods"])
    tables: dict[tuple[int, str, str], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        place = run["concurrency"], run["category"], run["method"]
        tables.setdefault(place, []).append(run)
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for concurrency in dict.fromkeys(place[0] for place in tables):
        categories = list(dict.fromkeys(place[1] for place in tables if place[0] == concurrency))
        runs = {c: {label: tables[concurrency, c, label] for label in labels} for c in categories}
        by_category = {c: {label: category_figures(runs[c][label], columns) for label in labels} for c in categories}
        by_category[MEAN] = {label: {} for label in labels}
        for name, ratios in _ratios(runs, columns, base or labels[0]).items():
            for place, figure in ratios.items():
                by_category[place[0]][place[1]][f"{name}_ratio"] = figure
        for label in labels:
            members = [by_category[c][label] for c in categories]
            by_category[MEAN][label] |= _means(members)
        found[str(concurrency)] = by_category
    return found


def category_figures(runs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """What one method did in one category, all rounds together.

    Args:
        runs: one per round.
        columns: of their rows.

    Returns:
        ``tokens_per_s``, ``ttft_ms`` (median), ``tpot_ms`` (pooled: decode time by the tokens behind each
        answer's first), ``in_flight`` (mean requests in flight), what `benchmarks.steps.acceptance` tells,
        with a prompt's rounds taken together; ``drafted_at`` and ``accepted_at`` (draft tokens by their
        position); ``equal`` and ``common_prefix`` with the first method's answers, and ``score``.
    """
    column = {name: np.array([row[i] for run in runs for row in run["rows"]], float) for i, name in enumerate(columns)}
    prompts = column["prompt"].astype(int)
    counts = []
    for prompt in np.unique(prompts):
        own = {name: int(np.nansum(values[prompts == prompt])) for name, values in column.items()}
        # Of every answer the first token is its prefill's.
        decode_tokens = own["tokens"] - int((prompts == prompt).sum())
        counts.append(steps.Counts(own["steps"], decode_tokens, own["drafted"], own["accepted"]))
    seconds = sum(run["seconds"] for run in runs)
    decode_tokens = sum(count.decode_tokens for count in counts)
    drafted_at, accepted_at = (_added([run[key] for run in runs]) for key in ("drafted_at", "accepted_at"))
    decoding = any(count.decode_steps for count in counts)
    acceptance = steps.acceptance(counts, ["all"] * len(counts)) if decoding else {}
    rng = np.random.default_rng(0)
    return {
        "tokens_per_s": float(column["tokens"].sum() / seconds),
        "ttft_ms": float(np.median(column["ttft_ms"])),
        "tpot_ms": float(column["decode_ms"].sum() / decode_tokens) if decode_tokens else None,
        "in_flight": float((column["ttft_ms"] + column["decode_ms"]).sum() / 1000 / seconds),
        **acceptance,
        "drafted_at": drafted_at,
        "accepted_at": accepted_at,
        "equal": float((column["common_prefix"] == 1).mean()),
        "common_prefix": float(column["common_prefix"].mean()),
        "score": _mean_with_interval(column["score"], prompts, rng),
    }


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know: methods that remember earlier rounds, batches that were too small."""
    found = []
    steps_at, tokens_at = result["columns"].index("steps"), result["columns"].index("tokens")
    concurrency = result["runs"][0]["concurrency"]
    last = max(run["round"] for run in result["runs"])
    for label in result["methods"]:
        mal = []
        for number in (0, last):
            rows = [
                row
                for run in result["runs"]
                if (run["method"], run["concurrency"], run["round"]) == (label, concurrency, number)
                for row in run["rows"]
            ]
            num_steps = sum(row[steps_at] for row in rows)
            mal.append(sum(row[tokens_at] - 1 for row in rows) / max(num_steps, 1))
        if mal[1] > REMEMBERS * mal[0]:
            found.append(
                f"NOTE: {label} had a MAL of {mal[0]:.2f} in the first round, of {mal[1]:.2f} in the last, "
                "over the same prompts. It remembers earlier answers, and its figures flatter it."
            )
    for run in result["runs"]:
        if len(run["rows"]) < run["concurrency"]:
            found.append(
                f"NOTE: {run['category']} has {len(run['rows'])} prompts, not the {run['concurrency']} "
                "that should have been in flight."
            )
    return list(dict.fromkeys(found))


def _ratios(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], columns: Sequence[str], base: str
) -> dict[str, dict[tuple[str, str], dict[str, float | None]]]:
    """Each of `RATIOS` by category (or `MEAN`) and method."""
    num_rounds = len(next(iter(runs.values()))[base])
    rng = np.random.default_rng(0)
    round_draws = statistics.draws(num_rounds, rng)
    found: dict[str, dict[tuple[str, str], dict[str, float | None]]] = {name: {} for name in RATIOS}
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    for category, by_label in runs.items():
        arrays = {label: _by_prompt_and_round(of, columns) for label, of in by_label.items()}
        prompt_draws = statistics.draws(len(arrays[base]["tokens"]), rng)

        def mean(array: Mapping[str, np.ndarray], top: str, bottom: str) -> np.ndarray:
            return statistics.crossed_ratio(array[top], array[bottom], prompt_draws, round_draws)

        length = mean(arrays[base], "decode_tokens", "answers")
        for name in RATIOS:
            times = {}
            for label, array in arrays.items():
                if name == "tpot":
                    times[label] = mean(array, "decode_ms", "decode_tokens")
                else:
                    per_token = mean(array, "charged_decode_ms", "decode_tokens")
                    # Where no answer has a second token there is nothing to multiply.
                    decoding = np.where(length > 0, length * per_token, 0.0)
                    times[label] = mean(array, "charged_prefill_ms", "answers") + decoding
            for label, time in times.items():
                ratio = times[base] / time
                found[name][category, label] = statistics.with_interval(ratio)
                if np.isfinite(ratio[0]):
                    logs.setdefault((name, label), []).append(np.log(ratio))
    for (name, label), of in logs.items():
        found[name][MEAN, label] = statistics.with_interval(np.exp(np.mean(of, axis=0)))
    return found


def _by_prompt_and_round(runs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """What the ratios need, as ``[num_prompts, num_rounds]``."""
    rounds = sorted(runs, key=lambda run: run["round"])
    ordered = [sorted(run["rows"], key=lambda row: row[columns.index("prompt")]) for run in rounds]
    arrays = {
        name: np.array([[row[columns.index(name)] for row in rows] for rows in ordered], float).T
        for name in ("tokens", "charged_ms", "ttft_ms", "decode_ms")
    }
    charged = arrays["charged_ms"] / (arrays["ttft_ms"] + arrays["decode_ms"])
    return {
        "answers": np.ones_like(charged),
        "tokens": arrays["tokens"],
        "decode_tokens": arrays["tokens"] - 1,
        "decode_ms": arrays["decode_ms"],
        "charged_prefill_ms": charged * arrays["ttft_ms"],
        "charged_decode_ms": charged * arrays["decode_ms"],
    }


def _means(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over categories: geometric of speeds, times and MAL, arithmetic of shares and counts."""

    def known(key: str) -> list[float]:
        values = [member.get(key) for member in members]
        return [value["value"] if isinstance(value, dict) else value for value in values if value is not None]

    def mean(key: str) -> float | None:
        return float(np.mean(known(key))) if known(key) else None

    def geometric(key: str) -> float | None:
        return float(np.exp(np.mean(np.log(known(key))))) if known(key) else None

    # MAL has an interval elsewhere; the others' scales differ too much for one to tell anything.
    return {key: geometric(key) for key in ("tokens_per_s", "ttft_ms", "tpot_ms", "mal", "mal_per_question")} | {
        key: mean(key)
        for key in (
            "in_flight",
            "drafted_per_step",
            "accepted_per_step",
            "acceptance_rate",
            "equal",
            "common_prefix",
        )
    }


def _mean_with_interval(values: np.ndarray, prompts: np.ndarray, rng: np.random.Generator) -> dict | None:
    """The mean over prompts of each prompt's mean over rounds; None where there is no score."""
    if np.isnan(values).any():
        return None
    own = np.array([[values[prompts == prompt].mean()] for prompt in np.unique(prompts)])
    one_round = np.ones((statistics.RESAMPLES, 1))
    drawn = statistics.crossed_ratio(own, np.ones_like(own), statistics.draws(len(own), rng), one_round)
    return statistics.with_interval(drawn)


def _added(lists: Sequence[Sequence[int]]) -> list[int]:
    width = max((len(one) for one in lists), default=0)
    return [sum(one[i] for one in lists if i < len(one)) for i in range(width)]
