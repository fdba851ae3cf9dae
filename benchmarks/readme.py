"""The README's tables of figures, drawn from result files and nothing else.

Each stands between ``<!-- NAME: drawn by benchmarks.plot -->`` and ``<!-- end -->``; a table whose result isn't there
says so. `python -m benchmarks.plot --readme` writes them.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import readme_tables, results
from vllm_aasd.tuning import report

README = results.ROOT / "README.md"

_BLOCK = re.compile(r"(<!-- (\w+): drawn by benchmarks\.plot -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "tokens_per_step": ("end_to_end_one.json", readme_tables.tokens_per_step),
    "speed_one": ("end_to_end_one.json", readme_tables.speed),
    "speed_sampled_one": ("end_to_end_sampled_one.json", readme_tables.speed),
    "speed_many": ("end_to_end_many.json", readme_tables.speed),
    "speed_sampled_many": ("end_to_end_sampled_many.json", readme_tables.speed),
    "speed": ("end_to_end.json", readme_tables.speed),
    "speed_sampled": ("end_to_end_sampled.json", readme_tables.speed),
    "speed_float32": ("end_to_end_float32.json", readme_tables.speed),
    "speed_float32_sampled": ("end_to_end_float32_sampled.json", readme_tables.speed),
    "speed_float32_repeated": ("end_to_end_float32_repeated.json", readme_tables.speed),
    "speed_float32_qa": ("end_to_end_float32_qa.json", readme_tables.speed),
    "serving": ("serving.json", readme_tables.serving),
    "load": ("load.json", readme_tables.load),
    "frontier": ("frontier.json", report.table),
    "ablation": ("ablation.json", readme_tables.ablation),
    "calibration": ("calibration.json", readme_tables.calibration),
    "drafter_time": ("drafter_time.json", readme_tables.drafter_time),
    "worst_case": ("worst_case.json", readme_tables.worst_case),
    "prefill": ("prefill.json", readme_tables.prefill),
    "verifier_time": ("verifier_time.json", readme_tables.verifier_time),
    "projection": ("projection.json", readme_tables.projection),
    "kernels": ("kernels.json", readme_tables.kernels),
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
