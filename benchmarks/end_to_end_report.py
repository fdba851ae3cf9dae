"""The tables of an end-to-end comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import comparison, results
from benchmarks.comparison import MEAN
from benchmarks.exactness import failed

Cell = Callable[[Mapping[str, Any]], str]


def report(result: Mapping[str, Any], base: str | None = None) -> str:
    """All tables, or what is wrong where there are none.

    Args:
        result: as `benchmarks.end_to_end` writes it; its figures are computed from its rows again.
        base: the method that ratios are to; None for the first.
    """
    parts = [results.heading(result), conditions(result["metadata"]["conditions"])]
    inexact = failed(result["exactness"])
    if inexact:
        parts += [f"NO FIGURES: {label} isn't exact. {exactness(result['exactness'][label])}" for label in inexact]
        return "\n\n".join(parts)
    for concurrency, figures in comparison.figures(result, base).items():
        parts.append(tables(int(concurrency), figures, list(result["methods"]), base))
    if result["metadata"]["conditions"]["temperature"] > 0:
        return "\n\n".join([*parts, "Answers are sampled, so exactness isn't checked.", *comparison.notes(result)])
    parts.append(
        "Answers, compared with the first method's at the same concurrency:\n"
        + "\n".join(f"- {label}: {exactness(found)}" for label, found in list(result["exactness"].items())[1:])
    )
    parts += comparison.notes(result)
    return "\n\n".join(parts)


def conditions(of: Mapping[str, Any]) -> str:
    """How it was run, in two sentences."""
    mode = "eager" if of["eager"] else "compiled"
    where = f"core {of['core']}" if of["core"] is not None else "any core"
    return (
        f"{of['model']} in {of['dtype']}, {mode}, temperature {of['temperature']:g}, answers of up to "
        f"{of['max_tokens']} tokens to prompts of up to {of['max_prompt_tokens']}, {of['rounds']} rounds. "
        f"One engine process per method, {of['threads']} thread(s) on {where}, prefix caching "
        f"{'on' if of['prefix_caching'] else 'off'}; no HTTP and no detokenising."
    )


def tables(
    concurrency: int, figures: Mapping[str, Mapping[str, Any]], labels: Sequence[str], base: str | None = None
) -> str:
    """The tables of one concurrency."""
    first, base = labels[0], base or labels[0]
    in_flight = results.number(figures[MEAN][first]["in_flight"], 1)
    head = f"## {concurrency} requests at once ({first} had {in_flight} in flight in the mean)"

    def table(*columns: tuple[str, Cell, bool]) -> str:
        """Columns of each method, those of the base left out where they tell nothing."""
        return _table(
            figures,
            [
                (f"{label}, {heading}", label, cell)
                for heading, cell, with_base in columns
                for label in labels
                if with_base or label != base
            ],
        )

    parts = (
        "## One request at a time" if concurrency == 1 else head,
        f"Speed, as a ratio to {base} (above 1 is faster): tokens/s with prefill, and per token behind the "
        "first (TPOT); [95 % bootstrap interval over prompts and rounds].",
        table(("tokens/s", _interval("tokens_per_s_ratio"), False), ("TPOT", _interval("tpot_ratio"), False)),
        "MAL (tokens per decode step; with its interval, and as the mean of the questions' own), drafted and "
        "accepted tokens per step.",
        table(
            ("MAL", _interval("mal"), False),
            ("MAL of questions", _number("mal_per_question"), False),
            ("drafted", _number("drafted_per_step"), False),
            ("accepted", _number("accepted_per_step"), False),
        ),
        "Tokens/s, median time to first token (ms) and time per output token (ms).",
        table(
            ("tokens/s", _number("tokens_per_s", 1), True),
            ("TTFT", _number("ttft_ms", 0), True),
            ("TPOT", _number("tpot_ms", 1), True),
        ),
        f"Answers: share equal to {first}'s, share of them before the first difference, and task scores.",
        table(
            ("equal", _number("equal"), False),
            ("prefix", _number("common_prefix"), False),
            ("score", _interval("score"), True),
        ),
        "Acceptance by position of the draft token: accepted by drafted, all categories.",
        _positions(figures, labels),
    )
    return "\n\n".join(part for part in parts if part)


def exactness(found: Mapping[str, Any] | None) -> str:
    """A verdict in words."""
    if found is None:
        return "the greedy answers aren't promised"
    if not found["num_different"]:
        return f"all {found['num_answers']} are equal"
    gap = found["largest_gap_nats"]
    worst = "one ends where the other goes on" if gap is None else f"gaps of up to {gap:.2g} nats"
    counts = f"{found['num_different']} of {found['num_answers']} part, {found['num_wider']} beyond a near tie"
    return f"{counts}; {worst}"


def _table(figures: Mapping[str, Any], columns: Sequence[tuple[str, str, Cell]]) -> str:
    if not columns:
        return ""
    places = [*(category for category in figures if category != MEAN), MEAN]
    header = ["category", *(heading for heading, _, _ in columns)]
    rows = [[place, *(cell(figures[place][label]) for _, label, cell in columns)] for place in places]
    return results.table(header, rows)


def _interval(key: str) -> Cell:
    def cell(figures: Mapping[str, Any]) -> str:
        figure = figures.get(key)
        if not isinstance(figure, Mapping) or figure["value"] is None or figure["low"] is None:
            return _number(key)(figures)
        return results.interval(figure)

    return cell


def _number(key: str, digits: int = 2) -> Cell:
    def cell(figures: Mapping[str, Any]) -> str:
        figure = figures.get(key)
        return results.number(figure["value"] if isinstance(figure, Mapping) else figure, digits)

    return cell


def _positions(figures: Mapping[str, Any], labels: Sequence[str]) -> str:
    rows = []
    for label in labels:
        members = [of[label] for category, of in figures.items() if category != MEAN]
        depth = max(len(of["drafted_at"]) for of in members)
        cells = []
        for position in range(depth):
            deep = [of for of in members if position < len(of["drafted_at"])]
            drafted = sum(of["drafted_at"][position] for of in deep)
            cells.append(results.number(sum(of["accepted_at"][position] for of in deep) / drafted))
        if cells:
            rows.append([label, *cells])
    depth = max((len(row) for row in rows), default=0)
    header = ["method", *map(str, range(1, depth))]
    return results.table(header, [row + ["-"] * (depth - len(row)) for row in rows]) if rows else ""
