"""Figures, drawn from result files and nothing else.

    python -m benchmarks.plot calibration

Writes ``results/NAME.svg`` beside the result that it draws. Needs matplotlib (``pip install vllm-aasd[bench]``).
"""

import argparse
import pathlib
from typing import Any

from benchmarks import results

_LARGEST_DOT = 220.0


def calibration(result: dict[str, Any]) -> Any:
    """Predicted survival against observed acceptance, a panel per category; a dot's area is its tokens.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    reliability = result["calibration"]["reliability"]
    columns = 4
    rows = -(-len(reliability) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.4 * rows), layout="constrained")
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


FIGURES = {"calibration": calibration}


def main() -> None:
    """Draw the figures that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", choices=FIGURES)
    parser.add_argument("--results", type=pathlib.Path, default=results.RESULTS, help="their folder")
    arguments = parser.parse_args()
    import matplotlib

    # Text as text, and nothing that differs between two drawings of the same result.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "aasd"})
    for name in arguments.figures:
        path = arguments.results / f"{name}.svg"
        FIGURES[name](results.read(path.with_suffix(".json"))).savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
