"""The comparison as a table and as a plot."""

from collections.abc import Mapping
from typing import Any

from vllm_aasd.tuning.candidates import OFF, STRICT

_COLUMNS = {
    "speed": ("speed", 1, 2),
    "rouge_l": ("agreement (ROUGE-L)", 1, 2),
    "equal": ("same answers, %", 100, 0),
    "copied": ("copied, %", 100, 1),
    "repeated": ("repeated, %", 100, 1),
    "not_argmax": ("not the argmax, %", 100, 1),
    "regret": ("regret, nats a token", 1, 3),
    "score": ("task score", 1, 2),
}
"""Figure: heading, scale and digits."""

_MARKERS = "osD^vP*X<>ph"


def table(result: Mapping[str, Any]) -> str:
    """The figures of all ways of answering, in Markdown; with intervals."""
    columns = {
        key: column for key, column in _COLUMNS.items() if any(run[key] is not None for run in result["runs"].values())
    }
    header = ["", *(heading for heading, _, _ in columns.values())]
    header.insert(2, "tokens a step")
    rows = []
    for name, run in result["runs"].items():
        cells = [_cell(run[key], scale, digits) for key, (_, scale, digits) in columns.items()]
        cells.insert(1, "-" if run["mal"] is None else f"{run['mal']:.2f}")
        rows.append([f"**{name}**" if name == result["recommended"] else name, *cells])
    widths = [max(len(line[place]) for line in (header, *rows)) for place in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, ["-" * width for width in widths], *rows)
    )


def figure(result: Mapping[str, Any]) -> Any:
    """Speed against agreement, and against what is copied, as a figure of matplotlib.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    from matplotlib.figure import Figure

    panels = {"rouge_l": "agreement with no speculation (ROUGE-L)", "copied": "share copied from the prompt"}
    drawn = Figure(figsize=(9, 5), layout="constrained")
    for axis, (key, heading) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (name, run) in enumerate(result["runs"].items()):
            axis.errorbar(
                run["speed"]["value"],
                run[key]["value"],
                _whiskers(run[key]),
                _whiskers(run["speed"]),
                marker=_MARKERS[number % len(_MARKERS)],
                # Others may lie on these.
                markersize=12 if name in (OFF, STRICT) else 6,
                markerfacecolor="none" if name in (OFF, STRICT) else None,
                linestyle="none",
                elinewidth=0.8,
                capsize=2,
                label=name,
            )
        axis.set_xlabel("speed against no speculation (time per output token)")
        axis.set_ylabel(heading)
        axis.set_ylim(0, 1.05 if key == "rouge_l" else None)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return drawn


def _whiskers(found: Mapping[str, float]) -> list[list[float]]:
    return [[max(found["value"] - found["low"], 0)], [max(found["high"] - found["value"], 0)]]


def _cell(found: Mapping[str, float] | None, scale: float, digits: int) -> str:
    if found is None or found["value"] is None:
        return "-"
    value, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
