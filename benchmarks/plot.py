"""Figures and the README's tables, drawn from result files and nothing else.

    python -m benchmarks.plot              # every figure whose result is there
    python -m benchmarks.plot calibration frontier
    python -m benchmarks.plot --readme     # the tables of the README

Writes ``results/NAME.svg`` beside the result that it draws. Needs matplotlib (``pip install vllm-aasd[bench]``).
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import figures, readme, results
from vllm_aasd.tuning import report

FIGURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "speed": ("end_to_end.json", figures.speed),
    "speed_sampled": ("end_to_end_sampled.json", figures.speed),
    "calibration": ("calibration.json", figures.calibration),
    "drafter_time": ("drafter_time.json", figures.drafter_time),
    "frontier": ("frontier.json", report.figure),
    "ablation": ("ablation.json", figures.ablation),
    "projection": ("projection.json", figures.projection),
}
"""By name: the result, and what draws it."""


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="default: all whose result is there")
    parser.add_argument("--results", type=pathlib.Path, default=results.RESULTS, help="their folder")
    parser.add_argument("--readme", action="store_true", help="write the README's tables instead")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="default %(default)s")
    arguments = parser.parse_args()
    if arguments.readme:
        readme.README.write_text(readme.updated(readme.README.read_text(), arguments.results))
        print(readme.README)
        return
    try:
        for path in draw(arguments.figures, arguments.results, arguments.format):
            print(path)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def draw(names: list[str], folder: pathlib.Path, kind: str = "svg") -> list[pathlib.Path]:
    """Draw figures; returns their files.

    Args:
        names: of `FIGURES`; none for all whose result is in the folder.
        folder: of the results.
        kind: ``svg`` or ``png``.

    Raises:
        FileNotFoundError: for a figure whose result isn't there; the text says what makes it.
        ValueError: for a run that isn't exact: it has no speed.
    """
    import matplotlib

    # Text as text, and nothing that differs between two drawings of the same result.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "aasd"})
    drawn = []
    for name in names or [name for name, (result, _) in FIGURES.items() if (folder / result).exists()]:
        result, figure = FIGURES[name]
        if not (folder / result).exists():
            program = result.removesuffix(".json")
            raise FileNotFoundError(f"no {result} in {folder}; `python -m benchmarks.suite --only {program}` makes it")
        path = folder / f"{name}.{kind}"
        options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 110}
        figure(results.read(folder / result)).savefig(path, **options)
        drawn.append(path)
    return drawn


if __name__ == "__main__":
    main()
