"""The figures, each drawn from one result; matplotlib is imported where one is drawn."""

from collections.abc import Mapping
from typing import Any

from benchmarks import comparison, projection_report
from benchmarks.comparison import MEAN
from benchmarks.exactness import failed

_LARGEST_DOT = 220.0
_MARKERS = "osD^vP"


def calibration(result: Mapping[str, Any]) -> Any:
    """Predicted survival against observed acceptance, a panel per category; a dot's area is its tokens.

    Returns:
        A figure of matplotlib, as all of these.
    """
    reliability = result["calibration"]["reliability"]
    columns = 4
    rows = -(-len(reliability) // columns)
    figure = _figure(2.4 * columns, 2.4 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (category, entry) in zip(axes.flat, reliability.items(), strict=False):
        most = max(bin_["count"] for bin_ in entry["bins"])
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.scatter(
            [bin_["predicted"] for bin_ in entry["bins"]],
            [bin_["accepted"] for bin_ in entry["bins"]],
            [_LARGEST_DOT * bin_["count"] / most for bin_ in entry["bins"]],
            alpha=0.7,
        )
        axis.set_title(f"{category}, ECE {entry['ece']:.3f}", fontsize=9)
    for axis in axes.flat[len(reliability) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted survival of a draft token")
    figure.supylabel("accepted")
    return figure


def speed(result: Mapping[str, Any]) -> Any:
    """Tokens a second by method and concurrency, as a ratio to the first method, with intervals.

    Raises:
        ValueError: for a run that isn't exact: it has no speed.
    """
    if failed(result["exactness"]):
        raise ValueError(f"no speed: {', '.join(failed(result['exactness']))} isn't exact")
    found = comparison.figures(result)
    first, *others = result["methods"]
    figure = _figure(1.6 + 1.5 * len(found), 3.4)
    axis = figure.subplots()
    width = 0.8 / max(len(others), 1)
    for number, label in enumerate(others):
        ratios = [of[MEAN][label]["tokens_per_s_ratio"] for of in found.values()]
        places = [at + (number - (len(others) - 1) / 2) * width for at in range(len(found))]
        values = [ratio["value"] for ratio in ratios]
        axis.bar(places, values, width * 0.9, label=label)
        axis.errorbar(places, values, _whiskers(ratios), fmt="none", color="0.2", linewidth=1, capsize=2)
    axis.axhline(1, color="0.4", linewidth=1)
    axis.set_xticks(range(len(found)), list(found))
    axis.set_xlabel("requests at once")
    axis.set_ylabel(f"tokens/s, by {first}")
    figure.legend(loc="outside upper center", ncols=min(len(others), 3), fontsize=8, frameon=False)
    return figure


def drafter_time(result: Mapping[str, Any]) -> Any:
    """Microseconds of a draft by the length of the context; the line's upper end is the 95th percentile."""
    figure = _figure(5, 3.2)
    axis = figure.subplots()
    contexts = [row["context_tokens"] for row in result["rows"]]
    kinds = {"aligned": "aasd", "without_alignment": "aasd, nothing stored", "vllm_ngram": "vLLM ngram"}
    for number, (key, label) in enumerate(kinds.items()):
        # Side by side, so that no whisker hides another.
        beside = [context * 1.06 ** (number - 1) for context in contexts]
        medians = [row[key]["median"] for row in result["rows"]]
        above = [row[key]["p95"] - row[key]["median"] for row in result["rows"]]
        axis.errorbar(
            beside,
            medians,
            [[0] * len(above), above],
            marker=_MARKERS[number],
            capsize=2,
            linewidth=1.2,
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("µs per draft, median to p95")
    axis.legend(fontsize=8, frameon=False)
    return figure


def ablation(result: Mapping[str, Any]) -> Any:
    """Speed by the parts that the drafter has, at each price of a draft token."""
    figure = _figure(7, 3.2)
    axis = figure.subplots()
    stages = list(result["stages"])
    prices = list(next(iter(result["stages"].values())))
    for number, price in enumerate(prices):
        found = [result["stages"][stage][price]["speed"] for stage in stages]
        shift = (number - (len(prices) - 1) / 2) * 0.2
        axis.errorbar(
            [of["value"] for of in found],
            [place + shift for place in range(len(stages))],
            xerr=_whiskers(found),
            marker=_MARKERS[number],
            linestyle="none",
            capsize=2,
            label=f"a draft token costs {float(price):.0%} of a step",
        )
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_yticks(range(len(stages)), stages)
    axis.invert_yaxis()
    axis.set_xlabel("tokens per unit of time, by plain decoding (replayed)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def projection(result: Mapping[str, Any]) -> Any:
    """Projected speed-ups by batch, a panel per target and machine; hollow where memory doesn't hold the batch."""
    places = projection_report.places(result)
    columns = 2
    rows = -(-len(places) // columns)
    figure = _figure(4 * columns, 2.7 * rows + 0.6)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (target, machine) in zip(axes.flat, places, strict=False):
        chosen = projection_report.select(result, target=target, machine=machine)
        batches = [row["batch"] for row in chosen]
        for number, label in enumerate(chosen[0]["methods"]):
            speeds = [row["methods"][label]["speed_up"] for row in chosen]
            (line,) = axis.plot(batches, speeds, linewidth=1.2, label=label)
            for batch, value, row in zip(batches, speeds, chosen, strict=True):
                axis.plot(
                    batch,
                    value,
                    marker=_MARKERS[number],
                    markersize=5,
                    color=line.get_color(),
                    markerfacecolor=line.get_color() if row["fits"] else "white",
                )
        axis.axhline(1, color="0.4", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.set_title(f"{target}, {machine}", fontsize=9)
    for axis in axes.flat[len(places) :]:
        axis.set_visible(False)
    # Not the figure's label, which would lie over the legend.
    for axis in axes[-1]:
        axis.set_xlabel("requests in the batch (hollow: beyond its memory)", fontsize=9)
    figure.supylabel("speed-up of decoding", fontsize=9)
    figure.suptitle("Projection: computed, not measured", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _whiskers(found: list[Mapping[str, float]]) -> list[list[float]]:
    """Lengths of the lines below and above values; none where there is no interval."""

    def length(of: Mapping[str, float], end: str) -> float:
        return 0.0 if of[end] is None else max(abs(of[end] - of["value"]), 0.0)

    return [[length(of, end) for of in found] for end in ("low", "high")]
