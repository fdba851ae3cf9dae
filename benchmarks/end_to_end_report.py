"""The tables of an end-to-end comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.comparison import MEAN

Cell = Callable[[Mapping[str, Any]], str]


def report(result: Mapping[str, Any]) -> str:
    """All tables, or what is wrong where there are none."""
    parts = [results.heading(result), conditions(result["metadata"]["conditions"])]
    failed = [label for label, found in result["exactness"].items() if found and not found["is_exact"]]
    if failed:
        parts += [
            f"NO FIGURES: {label} isn't exact. {exactness(result['exactness'][label])}" for label in failed
        ]
        return "\n\n".join(parts)
    for concurrency, figures in result["figures"].items():
        parts.append(tables(int(concurrency), figures, list(result["methods"])))
    parts.append(
        "Answers, compared with the first method's at the same concurrency:\n"
        + "\n".join(
            f"- {label}: {exactness(found)}" for label, found in list(result["exactness"].items())[1:]
        )
    )
    parts += result["notes"]
    return "\n\n".join(parts)


def conditions(of: Mapping[str, Any]) -> str:
    """How it was run, in two sentences."""
    mode = "eager" if of["eager"] else "compiled"
    where = f"core {of['core']}" if of["core"] is not None else "any core"
    return (
        f"{of['model']} in {of['dtype']}, {mode}, temperature {of['temperature']:g}, up to {of['max_tokens']} tokens "
        f"an answer, prompts of up to {of['max_prompt_tokens']}, {of['rounds']} rounds. One engine process per "
        f"method, {of['threads']} thread(s) on {where}, prefix caching {'on' if of['prefix_caching'] else 'off'}; "
        "no HTTP and no detokenising."
    )


def tables(concurrency: int, figures: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> str:
    """The tables of one concurrency."""
    first, others = labels[0], labels[1:]
    categories = [category for category in figures if category != MEAN]
    in_flight = results.number(figures[MEAN][first]["in_flight"], 1)
    parts = [
        f"## {concurrency} at once (in the mean {in_flight} in flight)"
        if concurrency > 1
        else "## One request at a time",
        f"Speed, as a ratio to {first} (above 1 is faster): tokens/s with prefill, and per token behind the first "
        "(TPOT); [95 % bootstrap interval over prompts and rounds].",
        _table(
            [*categories, MEAN],
            figures,
            [(f"{label}, tokens/s", label, _ratio("tokens_per_s_ratio")) for label in others]
            + [(f"{label}, TPOT", label, _ratio("tpot_ratio")) for label in others],
        ),
        "MAL (tokens per decode step), and drafted tokens per step.",
        _table(
            [*categories, MEAN],
            figures,
            [(f"{label}, MAL", label, _number("mal")) for label in others]
            + [(f"{label}, drafted", label, _number("drafted_per_step")) for label in others],
        ),
        "Tokens/s, median time to first token (ms) and time per output token (ms).",
        _table(
            [*categories, MEAN],
            figures,
            [(f"{label}, tokens/s", label, _number("tokens_per_s", 1)) for label in labels]
            + [(f"{label}, TTFT", label, _number("ttft_ms", 0)) for label in labels]
            + [(f"{label}, TPOT", label, _number("tpot_ms", 1)) for label in labels],
        ),
        f"Answers: share equal to {first}'s, how much of them is before the first difference, and task scores.",
        _table(
            [*categories, MEAN],
            figures,
            [(f"{label}, equal", label, _number("equal")) for label in others]
            + [(f"{label}, prefix", label, _number("common_prefix")) for label in others]
            + [(f"{label}, score", label, _ratio("score")) for label in labels],
        ),
        "Acceptance by position of the draft token (all categories).",
        results.table(
            ["method", *map(str, range(1, _depth(figures, categories, others) + 1))],
            [
                [label, *_positions(figures, categories, label, _depth(figures, categories, others))]
                for label in others
            ],
        )
        if others
        else "",
    ]
    return "\n\n".join(part for part in parts if part)


def exactness(found: Mapping[str, Any] | None) -> str:
    """A verdict in words."""
    if found is None:
        return "the greedy answers aren't promised"
    if not found["num_different"]:
        return f"all {found['num_answers']} are equal"
    gap = found["largest_gap_nats"]
    worst = "one ends where the other goes on" if gap is None else f"gaps of up to {gap:.2g} nats"
    return f"{found['num_different']} of {found['num_answers']} part, {found['num_wider']} beyond a near tie; {worst}"


def _table(rows: Sequence[str], figures: Mapping[str, Any], columns: Sequence[tuple[str, str, Cell]]) -> str:
    if not columns:
        return ""
    header = ["category", *(heading for heading, _, _ in columns)]
    return results.table(
        header, [[row, *(cell(figures[row][label]) for _, label, cell in columns)] for row in rows]
    )


def _ratio(key: str) -> Cell:
    def cell(figures: Mapping[str, Any]) -> str:
        figure = figures.get(key)
        if not figure or figure["value"] is None:
            return "-"
        return results.number(figure["value"]) if figure["low"] is None else results.interval(figure)

    return cell


def _number(key: str, digits: int = 2) -> Cell:
    def cell(figures: Mapping[str, Any]) -> str:
        figure = figures.get(key)
        return results.number(figure["value"] if isinstance(figure, Mapping) else figure, digits)

    return cell


def _depth(figures: Mapping[str, Any], categories: Sequence[str], labels: Sequence[str]) -> int:
    return max((len(figures[c][label]["drafted_at"]) for c in categories for label in labels), default=0)


def _positions(figures: Mapping[str, Any], categories: Sequence[str], label: str, depth: int) -> list[str]:
    cells = []
    for position in range(depth):
        drafted = accepted = 0.0
        for category in categories:
            of = figures[category][label]
            if position < len(of["drafted_at"]):
                drafted += of["drafted_at"][position]
                accepted += of["drafted_at"][position] * of["acceptance_at"][position]
        cells.append(results.number(accepted / drafted if drafted else None))
    return cells
