"""The tables of the results, in Markdown: printed, and written into the docs between their markers.

    python -m benchmarks.report

A page has ``<!-- table: NAME -->`` and ``<!-- end -->`` around each table that is drawn from `benchmarks/results`.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import results
from benchmarks.comparison import MEAN
from benchmarks.results import interval, number, table

Result = Mapping[str, Any]
PAGES = (results.ROOT / "README.md", results.ROOT / "docs" / "benchmarks.md")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Print every table, and bring the pages up to date."""
    for name, draw in TABLES.items():
        print(f"{name}\n\n{draw()}\n")
    for page in PAGES:
        if page.exists():
            page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """A page with its tables as the results have them.

    Raises:
        KeyError: it has a marker of an unknown table.
    """
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def speed_results(is_sampled: bool) -> dict[str, dict[str, Result]]:
    """By model and concurrency, the newest result of `benchmarks.end_to_end` that has it."""
    found: dict[str, dict[str, Result]] = {}
    every = [results.read(path) for path in sorted(results.RESULTS.glob("end_to_end*.json"))]
    for result in sorted(every, key=lambda one: one["metadata"]["time"]):
        conditions = result["metadata"]["conditions"]
        if (conditions["temperature"] > 0) == is_sampled:
            found.setdefault(conditions["model"], {}).update(dict.fromkeys(result["figures"], result))
    order = lambda key: [int(digits) for digits in re.findall(r"\d+", key)]
    return {model: {key: of[key] for key in sorted(of, key=order)} for model, of in found.items()}


def readme() -> str:
    """The README's one table: greedy, 1, 8 and 32 at once, per output token and end to end, with its caption."""
    parts = []
    for by_concurrency in speed_results(False).values():
        of = {key: by_concurrency[key] for key in ("1", "8", "32") if key in by_concurrency}
        rows = []
        for key, result in of.items():
            mean = result["figures"][key][MEAN]
            plain = mean["none"]
            rows.append([key, f"{plain['tpot_ms']:.0f} ms per token, {plain['tokens_per_s']:.0f} tokens/s"])
            for label in _columns(result):
                cell = mean.get(label)
                rows[-1].append(f"**{cell['tpot']['value']:.2f}x** ({cell['speed']['value']:.2f}x)" if cell else "-")
        header = ["requests at once", "no speculation", "vLLM `ngram`", "vLLM `suffix`", "aasd"]
        meaning = "Speed per output token after the first (in parentheses: tokens/s, prompt included)."
        parts.append(f"{table(header, rows)}\n\n{meaning} {_caption(of)}")
    return "\n\n".join(parts)


def speed(is_sampled: bool) -> str:
    """Every load: time per output token and end to end, as ratios to no speculation with their intervals."""
    parts = []
    for by_concurrency in speed_results(is_sampled).values():
        rows = []
        for key, result in by_concurrency.items():
            mean = result["figures"][key][MEAN]
            for name, kind in (("per output token", "tpot"), ("end to end", "speed")):
                rows.append([key, name, *(interval(mean.get(label, {}).get(kind)) for label in _columns(result))])
        header = ["requests at once", "speed", "vLLM `ngram`", "vLLM `suffix`", "aasd"]
        parts.append(f"{table(header, rows)}\n\n{_caption(by_concurrency)}")
    return "\n\n".join(parts)


def categories() -> str:
    """Greedy, by category: speed per output token at 1, 8 and 32 at once."""
    parts = []
    for by_concurrency in speed_results(False).values():
        of = {key: by_concurrency[key] for key in ("1", "8", "32") if key in by_concurrency}
        columns = [(key, label) for key, result in of.items() for label in _columns(result)]
        header = ["category", *(f"{label.split()[0]}, {key}" for key, label in columns)]
        names = next(iter(of.values()))["figures"][next(iter(of))]
        cells = {name: [of[key]["figures"][key][name].get(label) for key, label in columns] for name in names}
        rows = [[name, *(number(one and one["tpot"]["value"]) for one in line)] for name, line in cells.items()]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def speed_by_category(result: Result) -> str:
    """All figures of one comparison, for the terminal."""
    parts = []
    columns = ("tokens_per_s", "ttft_ms", "tpot_ms", "mal", "drafted", "accepted", "in_flight", "equal")
    for key, by_category in result["figures"].items():
        rows = [
            [category, label, *(interval(found.get(kind)) for kind in ("tpot", "speed"))]
            + [number(found[column]) for column in columns]
            for category, of in by_category.items()
            for label, found in of.items()
        ]
        parts.append(f"{key} at once\n\n{table(['category', 'method', 'per token', 'end to end', *columns], rows)}")
    exact = [f"{label}: {found or 'greedy answers not promised'}" for label, found in result["exactness"].items()]
    return "\n\n".join([*parts, "Exactness: " + ("; ".join(exact) or "sampled answers aren't compared")])


def ablation(result: Result) -> str:
    """What each part of the drafter adds, at each price of a draft token."""
    rows, prices = [], []
    for name, by_price in result["ablation"].items():
        prices = [f"speed at {float(price):.0%}" for price in by_price]
        found = list(by_price.values())
        rows.append([name, number(found[0]["mal"]["value"]), *(interval(of["speed"]) for of in found)])
    return table(["drafter", "tokens per step", *prices], rows)


def calibration(result: Result) -> str:
    """Predicted survival and observed acceptance of draft tokens, by category."""
    rows = []
    for category, of in result["calibration"].items():
        count = sum(bin_[0] for bin_ in of["bins"])
        means = [sum(bin_[0] * bin_[place] for bin_ in of["bins"]) / count for place in (1, 2)]
        rows.append([category, str(count), *map(number, means), number(of["ece"], 3)])
    return table(["prompts", "draft tokens", "predicted", "accepted", "expected calibration error"], rows)


def fit(result: Result) -> str:
    """The figures of the constants before and after, by price."""
    keys = ("speed", "mal", "drafted", "ece")
    rows = [
        [name, price, *(number(of[key], 3) for key in keys)]
        for name, entry in result["fit"].items()
        for price, of in entry["figures"].items()
    ]
    return table(["constants", "price", *keys], rows)


def quality(result: Result) -> str:
    """Speed and damage of every verification rule."""
    columns = {"speed": "speed", "rouge_l": "ROUGE-L to plain", "equal": "equal", "copied": "copied"}
    columns |= {"repeated": "repeated", "score": "task score"}
    rows = [
        [name, number(run["mal"]), *(interval(run[key]) for key in columns)] for name, run in result["runs"].items()
    ]
    return table(["verification", "tokens per step", *columns.values()], rows)


def micro(result: Result) -> str:
    """Microseconds of drafts by context, and of verification by batch."""
    parts = []
    for name, keys in (("drafts", ["context"]), ("verification", ["vocab_size", "requests", "drafts"])):
        timed = [key for key in result[name][0] if key not in keys]
        rows = [
            [*(str(row[key]) for key in keys), *(f"{row[key][0]:.0f} / {row[key][1]:.0f}" for key in timed)]
            for row in result[name]
        ]
        parts.append(table([*keys, *(f"{key}, us" for key in timed)], rows))
    return "\n\n".join(parts)


def kernels(result: Result) -> str:
    """Registers per thread, by kernel and target; and whether any are spilled."""
    by_kernel: dict[str, dict[str, str]] = {}
    for row in result["builds"]:
        spilled = f", {row['spill_bytes']} B spilled" if row["spill_bytes"] else ""
        by_kernel.setdefault(row["kernel"], {})[row["target"]] = f"{row['registers']}{spilled}"
    rows = [[name, *of.values()] for name, of in by_kernel.items()]
    return table(["registers per thread", *next(iter(by_kernel.values()))], rows)


def _columns(result: Result) -> list[str]:
    """The labels of ngram, suffix and aasd in a result; of several of aasd, the last."""
    aasd = [label for label in result["methods"] if label.split()[0] == "aasd"]
    return ["ngram", "suffix", *aasd[-1:]]


def _caption(by_concurrency: Mapping[str, Result]) -> str:
    """What a table shows, and how it was measured: model, machine, commands."""
    every = list({id(result): result for result in by_concurrency.values()}.values())
    metadata = every[-1]["metadata"]
    conditions, machine = metadata["conditions"], metadata["machine"]
    how = f"temperature {conditions['temperature']:g}" if conditions["temperature"] else "greedy"
    commands = "; ".join(f"`{_command(one)}` (commit {one['metadata']['commit'][:9]})" for one in every)
    config = every[-1]["methods"][_columns(every[-1])[-1]]
    return (
        f"{conditions['model']}, {conditions['dtype']}, {how}, aasd as `{json.dumps(config)}`, answers of up to "
        f"{conditions['max_tokens']} tokens; {machine['cpu']}, {conditions['threads']} of {machine['cores']} cores, "
        f"vLLM {metadata['versions']['vllm']}; {metadata['time'][:10]}. {commands}."
    )


def _command(result: Result) -> str:
    """The command of a result, without what figures don't depend on."""
    return re.sub(r" --(out \S+|resume)", "", result["metadata"]["command"])


def _drawn(draw: Callable[[Result], str], file: str) -> Callable[[], str]:
    return lambda: draw(results.read(results.RESULTS / file))


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "speed_greedy": lambda: speed(False),
    "speed_sampled": lambda: speed(True),
    "categories": categories,
    "ablation": _drawn(ablation, "ablation.json"),
    "calibration": _drawn(calibration, "calibration.json"),
    "quality": _drawn(quality, "quality.json"),
    "micro": _drawn(micro, "micro.json"),
    "kernels": _drawn(kernels, "kernels.json"),
}

if __name__ == "__main__":
    main()
