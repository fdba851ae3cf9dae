"""The tables of the results, in Markdown: printed, and written into the docs between their markers.

    python -m benchmarks.report

A page has ``<!-- NAME -->`` and ``<!-- end -->`` around each table that is drawn from `benchmarks/results`.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import grammar, predictions, results
from benchmarks.comparison import MEAN
from benchmarks.results import interval, number, table

Result = Mapping[str, Any]
PAGES = (results.ROOT / "README.md", results.ROOT / "docs" / "benchmarks.md")
_MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = {"ngram": "vLLM `ngram`", "suffix": "vLLM `suffix`", "aasd": "aasd"}


def main() -> None:
    """Print every table, and bring the pages up to date."""
    for name, draw in TABLES.items():
        print(f"{name}\n\n{draw()}\n")
    for page in PAGES:
        if page.exists():
            page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """A page with its tables as the results have them; what others have marked stays."""
    return _MARKED.sub(lambda of: f"{of[1]}{TABLES[of[2]]()}\n{of[3]}" if of[2] in TABLES else of[0], text)


def speed_results(is_sampled: bool, files: str) -> dict[str, dict[str, dict[str, tuple[str, Result]]]]:
    """By model, concurrency and column of the tables, the newest result that has it, and the method's label there.

    Args:
        is_sampled: whether at temperature > 0.
        files: a pattern of the results' names.
    """
    found: dict[str, dict[str, dict[str, tuple[str, Result]]]] = {}
    every = [results.read(path) for path in sorted(results.RESULTS.glob(files))]
    for result in sorted(every, key=lambda one: one["metadata"]["time"]):
        conditions = result["metadata"]["conditions"]
        if (conditions["temperature"] > 0) == is_sampled:
            for key in result["figures"]:
                # Of several of aasd, the last counts.
                newer = {label.split()[0]: (label, result) for label in result["methods"]}
                found.setdefault(conditions["model"], {}).setdefault(key, {}).update(newer)
    order = lambda key: [int(digits) for digits in re.findall(r"\d+", key)]
    return {model: {key: of[key] for key in sorted(of, key=order)} for model, of in found.items()}


def speed(is_sampled: bool, keys: tuple[str, ...] = (), files: str = "end_to_end*.json") -> str:
    """Speed per output token, then end to end, as ratios to no speculation with their intervals; with a caption.

    Args:
        is_sampled: whether at temperature > 0.
        keys: the concurrencies; all by default, with no speculation in absolute figures where they are given.
        files: a pattern of the results' names.
    """
    parts = []
    for by_key in speed_results(is_sampled, files).values():
        rows = []
        chosen = {key: by_key[key] for key in keys or by_key if key in by_key}
        for key, columns in chosen.items():
            plain = _found(columns, key, MEAN, "none")
            cells = [_found(columns, key, MEAN, name) for name in _COLUMNS]
            if keys:
                first = f"{plain['tpot_ms']:.0f} ms per token, {plain['tokens_per_s']:.0f} tokens/s"
                ratios = [f"**{of['tpot']['value']:.2f}** ({of['speed']['value']:.2f})" if of else "-" for of in cells]
                rows.append([key, first, *ratios])
            else:
                rows.append(
                    [key, *("; ".join(map(interval, (of["tpot"], of["speed"]))) if of else "-" for of in cells)]
                )
        header = ["requests at once", *(["no speculation"] if keys else []), *_COLUMNS.values()]
        parts.append(f"{table(header, rows)}\n\n{_caption(chosen)}")
    return "\n\n".join(parts)


def warm() -> str:
    """The same where every prompt was answered once before."""
    return speed(False, tuple(f"{concurrency}, pass 2" for concurrency in (1, 8, 32)), "warm*.json")


def categories() -> str:
    """Greedy, by category: speed per output token at 1, 8 and 32 at once."""
    parts = []
    for by_key in speed_results(False, "end_to_end*.json").values():
        columns = [(key, name) for key in ("1", "8", "32") if key in by_key for name in _COLUMNS]
        rows = []
        for category in next(iter(by_key["1"].values()))[1]["figures"]["1"]:
            cells = [_found(by_key[key], key, category, name) for key, name in columns]
            rows.append([category, *(number(of["tpot"]["value"] if of else None) for of in cells)])
        parts.append(table(["category", *(f"{name}, {key}" for key, name in columns)], rows))
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


def comparison(result: Result) -> str:
    """Speed over no speculation per output token and end to end, and tokens per step; of all categories the mean."""
    rows = []
    for key, by_category in result["figures"].items():
        kinds = [name for name in by_category if name != MEAN]
        for category in kinds if len(kinds) < 3 else [MEAN]:
            for label, found in by_category[category].items():
                speeds = [interval(found.get(kind)) for kind in ("tpot", "speed")]
                rows.append([key, category, label, *speeds, number(found["mal"])])
    return table(["requests at once", "prompts", "method", "per token", "end to end", "tokens per step"], rows)


def ablation(result: Result) -> str:
    """What each part of the drafter adds, at each price of a draft token."""
    rows, prices = [], []
    for name, by_price in result["ablation"].items():
        prices = [f"speed at {float(price):.0%}" for price in by_price]
        found = list(by_price.values())
        rows.append([name, number(found[0]["mal"]["value"]), *(interval(of["speed"]) for of in found)])
    return table(["drafter", "tokens per step", *prices], rows)


def calibration(result: Result) -> str:
    """Predicted survival and observed acceptance of draft tokens, by tenths of the former, over all categories."""
    bins = result["calibration"]["all"]["bins"]
    rows = [["accepted", *(number(bin_[2]) for bin_ in bins)], ["draft tokens", *(str(bin_[0]) for bin_ in bins)]]
    return table(["predicted", *(number(bin_[1]) for bin_ in bins)], rows)


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


def scores(result: Result) -> str:
    """The scores of every verification rule by task, each with the difference to no speculation."""
    tasks = list(next(iter(result["runs"].values()))["by_group"])
    rows = [
        [name, interval(run["speed_to_strict"]), *(_score(run["by_group"][task]) for task in tasks)]
        for name, run in result["runs"].items()
    ]
    return table(["verification", "speed over strict", *tasks], rows)


def _score(found: Mapping[str, Any]) -> str:
    drop = found["score_drop"]
    return f"{number(found['score']['value'])}; {-drop['value']:+.3f} [{-drop['high']:+.3f}, {-drop['low']:+.3f}]"


def micro(result: Result) -> str:
    """Microseconds of drafts by context, and of verification by batch with the largest vocabulary."""
    parts = []
    for name, keys in (("drafts", ["context"]), ("verification", ["vocab_size", "requests", "drafts"])):
        timed = [key for key in result[name][0] if key not in keys]
        rows = [
            [*(str(row[key]) for key in keys), *(f"{row[key][0]:.0f} / {row[key][1]:.0f}" for key in timed)]
            for row in result[name]
            if row.get("vocab_size") == result[name][-1].get("vocab_size")
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


def _found(columns: Mapping[str, tuple[str, Result]], key: str, category: str, name: str) -> dict[str, Any]:
    """The figures of a column in a category; empty without any."""
    label, result = columns.get(name, ("", {"figures": {}}))
    return result["figures"].get(key, {}).get(category, {}).get(label, {})


def _caption(chosen: Mapping[str, Mapping[str, tuple[str, Result]]]) -> str:
    """What a table shows, and how it was measured: model, machine, commands."""
    every = [found for columns in chosen.values() for found in columns.values()]
    label, newest = max(every, key=lambda found: (found[0].startswith("aasd"), found[1]["metadata"]["time"]))
    metadata = newest["metadata"]
    conditions, machine = metadata["conditions"], metadata["machine"]
    how = f"temperature {conditions['temperature']:g}" if conditions["temperature"] else "greedy"
    commands = dict.fromkeys(f"`{_command(one)}` (commit {one['metadata']['commit'][:9]})" for _, one in every)
    return (
        f"{conditions['model']}, {conditions['dtype']}, {how}, aasd as `{json.dumps(newest['methods'][label])}`, "
        f"answers of up to {conditions['max_tokens']} tokens. {machine['cpu']}, {conditions['threads']} of "
        f"{machine['cores']} cores, vLLM {metadata['versions']['vllm']}, {metadata['time'][:10]}: "
        f"{'; '.join(commands)}."
    )


def _command(result: Result) -> str:
    """The command of a result, without what figures don't depend on."""
    return re.sub(r" --(out \S+|resume)", "", result["metadata"]["command"])


def _origin(result: Result) -> str:
    """Of what model a result is, and how it was measured."""
    metadata = result["metadata"]
    model = [metadata["conditions"]["model"]] if "model" in metadata["conditions"] else []
    return (
        f"{', '.join([*model, metadata['machine']['cpu']])}, "
        f"vLLM {metadata['versions']['vllm']}, {metadata['time'][:10]}: "
        f"`{_command(result)}` (commit {metadata['commit'][:9]})."
    )


def _drawn(draw: Callable[[Result], str], name: str) -> Callable[[], str]:
    """What draws the results whose files begin with a name, one after the other."""

    def every() -> str:
        found = [results.read(path) for path in sorted(results.RESULTS.glob(f"{name}*.json"))]
        return "\n\n".join(f"{draw(result)}\n\n{_origin(result)}" for result in found)

    return every


TABLES: dict[str, Callable[[], str]] = {
    "speed": lambda: speed(False, ("1", "8", "32")),
    "warm": warm,
    "speed_greedy": lambda: speed(False),
    "speed_sampled": lambda: speed(True),
    "categories": categories,
    **{name: _drawn(comparison, name) for name in ("agent", "rollouts", "halves", "corpus")},
    "predictions": _drawn(predictions.table, "predictions"),
    "grammar": _drawn(lambda result: grammar.table(result["figures"]), "grammar"),
    "ablation": _drawn(ablation, "ablation"),
    "calibration": _drawn(calibration, "calibration"),
    "quality": _drawn(quality, "quality"),
    "scores": _drawn(scores, "scores"),
    "micro": _drawn(micro, "micro"),
    "kernels": _drawn(kernels, "kernels"),
}

if __name__ == "__main__":
    main()
