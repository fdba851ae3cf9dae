"""The figures of an end-to-end comparison: by concurrency, category and method.

Ratios are to the first method, and above 1 where a method is faster. They are paired: numerator and denominator are
of the same prompts in the same rounds, and a resample draws prompts and rounds for both. The mean over categories is
the geometric one; a resample of it draws prompts within each category, and the same rounds for all.

``speed`` compares answers as long as the first method's: an answer that differs at a near tie, or is sampled, can be
much shorter or longer, and since the prompt's time is shared among its tokens, tokens/s would tell its length more
than speed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.rounds import Found
from vllm_aasd.tuning import RESAMPLES, with_interval

MEAN = "mean"
RATIOS = ("speed", "tpot")


def figures(found: Found, labels: Sequence[str]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """All figures, by concurrency and pass (``"8"``, then ``"8, pass 2"``), category or `MEAN`, and method.

    Args:
        found: see `benchmarks.rounds.measure`.
        labels: the methods; the first is the one compared with.
    """
    tables: dict[str, Any] = {}
    for concurrency, visit in dict.fromkeys((place.concurrency, place.visit) for place in found):
        entries: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for place, entry in sorted(found.items(), key=lambda item: item[0].round):
            if (place.concurrency, place.visit) == (concurrency, visit):
                entries.setdefault(place.category, {}).setdefault(place.method, []).append(entry)
        by_category = {
            category: {label: _figures(of[label], of[labels[0]]) for label in labels}
            for category, of in entries.items()
        }
        by_category[MEAN] = {label: _mean([of[label] for of in by_category.values()]) for label in labels}
        for (category, label), ratios in _ratios(entries, labels).items():
            by_category[category][label] |= ratios
        tables[f"{concurrency}, pass {visit + 1}" if visit else str(concurrency)] = by_category
    return tables


def _figures(entries: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one method did in one category, all rounds together: tokens/s, median time to first token, time per output
    token after the first, tokens and drafts per decode step, requests in flight, share of answers equal to the base."""
    rows = [row for entry in entries for row in entry["rows"]]
    plain = [row["token_ids"] for entry in base for row in entry["rows"]]
    tokens = sum(len(row["token_ids"]) for row in rows)
    steps = sum(row["steps"] for row in rows)
    seconds = sum(entry["seconds"] for entry in entries)
    # Every answer's first token is its prefill's.
    decoded = tokens - len(rows)
    decode_ms = sum(row["decode_ms"] for row in rows)
    return {
        "tokens_per_s": tokens / seconds,
        "ttft_ms": float(np.median([row["ttft_ms"] for row in rows])),
        "tpot_ms": decode_ms / decoded if decoded else None,
        "mal": decoded / steps if steps else None,
        "drafted": sum(row["drafted"] for row in rows) / steps if steps else None,
        "accepted": sum(row["accepted"] for row in rows) / steps if steps else None,
        "in_flight": sum(row["ttft_ms"] + row["decode_ms"] for row in rows) / 1000 / seconds,
        "equal": float(np.mean([row["token_ids"] == other for row, other in zip(rows, plain, strict=True)])),
    }


def _mean(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over categories: geometric of speeds, times and MAL, arithmetic of shares and counts."""
    found: dict[str, Any] = {}
    for key in members[0]:
        known = [member[key] for member in members if member[key] is not None]
        if key in ("tokens_per_s", "ttft_ms", "tpot_ms", "mal"):
            found[key] = float(np.exp(np.mean(np.log(known)))) if known else None
        else:
            found[key] = float(np.mean(known)) if known else None
    return found


def _ratios(
    entries: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], labels: Sequence[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Each of `RATIOS`, with its interval, by category (or `MEAN`) and method."""
    rng = np.random.default_rng(0)
    num_rounds = len(next(iter(entries.values()))[labels[0]])
    round_draws = _draws(num_rounds, rng)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    for category, of in entries.items():
        prompt_draws = _draws(len(of[labels[0]][0]["rows"]), rng)

        def mean(values: np.ndarray, by: np.ndarray, prompt_draws: np.ndarray = prompt_draws) -> np.ndarray:
            """``[1 + RESAMPLES]``: a ratio of sums over prompts and rounds, of all and of each resample of both."""
            top, bottom = (np.einsum("sp,pr,sr->s", prompt_draws, one, round_draws) for one in (values, by))
            return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)

        arrays = {label: _by_prompt_and_round(of[label]) for label in labels}
        ones = np.ones_like(arrays[labels[0]]["decoded"])
        length = mean(arrays[labels[0]]["decoded"], ones)
        times: dict[str, dict[str, np.ndarray]] = {name: {} for name in RATIOS}
        for label, array in arrays.items():
            times["tpot"][label] = mean(array["decode_ms"], array["decoded"])
            # Where no answer has a second token there is nothing to multiply.
            decoding = np.where(length > 0, length * mean(array["decode_ms"] * array["share"], array["decoded"]), 0.0)
            times["speed"][label] = mean(array["ttft_ms"] * array["share"], ones) + decoding
        for label in labels[1:]:
            for name in RATIOS:
                ratio = times[name][labels[0]] / times[name][label]
                found.setdefault((category, label), {})[name] = with_interval(ratio)
                if np.isfinite(ratio[0]):
                    logs.setdefault((name, label), []).append(np.log(ratio))
    for (name, label), ratios in logs.items():
        found.setdefault((MEAN, label), {})[name] = with_interval(np.exp(np.mean(ratios, axis=0)))
    return found


def _draws(size: int, rng: np.random.Generator) -> np.ndarray:
    """``[1 + RESAMPLES, size]``, how often each of `size` things is drawn: once, then by resamples with replacement."""
    drawn = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return np.concatenate([np.ones((1, size)), drawn])


def _by_prompt_and_round(entries: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What the ratios need, as ``[num_prompts, num_rounds]``."""
    rounds = [sorted(entry["rows"], key=lambda row: row["prompt"]) for entry in entries]
    arrays = {
        key: np.array([[row[key] for row in rows] for rows in rounds], float).T
        for key in ("ttft_ms", "decode_ms", "share")
    }
    arrays["decoded"] = np.array([[len(row["token_ids"]) - 1 for row in rows] for rows in rounds], float).T
    return arrays
