"""The README's tables of figures, drawn from result files and nothing else.

Each stands between ``<!-- NAME: drawn by benchmarks.plot -->`` and ``<!-- end -->``; a table whose result isn't there
says so. `python -m benchmarks.plot --readme` writes them.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import comparison, projection_report, results
from benchmarks.comparison import MEAN
from benchmarks.data import GROUPS
from benchmarks.exactness import failed
from vllm_aasd.tuning import report

README = results.ROOT / "README.md"

_BLOCK = re.compile(r"(<!-- (\w+): drawn by benchmarks\.plot -->\n).*?(<!-- end -->)", re.DOTALL)

_HEADINGS = dict(zip(GROUPS, ("summarization", "RAG", "QA", "maths", "MT-bench"), strict=True))

_STRICT = ("aasd_verification", "strict")
_METHODS = {
    "none": "no speculation",
    "ngram": "vLLM `ngram` (1 to 3 tokens, drafts of 5)",
    "suffix": "vLLM `suffix`",
}


def acceptance(result: Mapping[str, Any]) -> str:
    """Mean acceptance length by category; drafted tokens per step."""
    rows = []
    for label, run in result["methods"].items():
        mean = run["mean"]
        drafted = mean["drafted_per_step"]
        rows.append(
            [method(label, run["speculative_config"])]
            + [results.number(run["groups"][group]["mal"]["value"]) for group in GROUPS]
            + [_spread(mean["mal"]), _spread(mean["mal_per_question"])]
            + [results.number(drafted, 1) if drafted else "0"]
        )
    header = ["tokens per step of the target", *_HEADINGS.values(), "mean", "mean over questions"]
    return results.table([*header, "drafted per step"], rows)


def speed(result: Mapping[str, Any]) -> str:
    """Tokens a second by method and concurrency, as a ratio to the first method; none of inexact runs."""
    if failed(result["exactness"]):
        return f"No figures: {', '.join(failed(result['exactness']))} didn't give the answers that it promises."
    figures = comparison.figures(result)
    labels = list(result["methods"])
    rows = [
        [method(label, result["methods"][label])]
        + [_spread(of[MEAN][label]["tokens_per_s_ratio"]) for of in figures.values()]
        for label in labels[1:]
    ]
    counts = [f"{number} at once" for number in figures]
    return results.table([f"tokens/s, by {method(labels[0], result['methods'][labels[0]])}", *counts], rows)


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
    prices = [f"speed where a draft token costs {float(price):.0%} of a step" for price in next(iter(result["stages"].values()))]
    return results.table(["drafter", "MAL", "drafted/step", *prices], rows)


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


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "speed": ("end_to_end.json", speed),
    "acceptance": ("acceptance.json", acceptance),
    "frontier": ("frontier.json", report.table),
    "ablation": ("ablation.json", ablation),
    "projection": ("projection.json", projection),
}
"""By the name in the README: the result, and what draws it."""


def updated(text: str, folder: pathlib.Path = results.RESULTS) -> str:
    """The README's text with every table drawn again.

    Raises:
        ValueError: for a table that isn't known.
    """

    def block(found: re.Match) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"README: no table {found[2]!r}; there are: {', '.join(TABLES)}")
        name, draw = TABLES[found[2]]
        path = folder / name
        body = draw(results.read(path)) if path.exists() else f"Not published yet (`benchmarks/results/{name}`)."
        return f"{found[1]}{body}\n{found[3]}"

    return _BLOCK.sub(block, text)


def method(label: str, speculative_config: Mapping[str, Any] | None) -> str:
    """How the README calls a method."""
    if label in _METHODS:
        return _METHODS[label]
    settings = dict(speculative_config)
    words = []
    # In an order that reads well; a length that is fixed for the comparison is said below the table.
    settings.pop("method")
    settings.pop("aasd_draft_length", None)
    if settings.get(_STRICT[0]) == _STRICT[1]:
        words.append("strict")
        settings.pop(_STRICT[0])
    if settings.pop("aasd_prior", True) is False:
        words.append("without its prior")
    if settings.pop("aasd_alignment", None) is True:
        words.append("predictions at prompt positions too")
    words += [f"`{key}` {value}" for key, value in settings.items()]
    return ", ".join(["aasd", *words])


def _spread(figure: Mapping[str, float]) -> str:
    return results.number(figure["value"]) if figure["low"] == figure["high"] else results.interval(figure)
