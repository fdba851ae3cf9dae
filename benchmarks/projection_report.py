"""The tables of a projection, its assumptions first."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import results

TITLE = "PROJECTION: computed, not measured; no GPU has run this."


def report(result: Mapping[str, Any]) -> str:
    """All of it as text."""
    parts = [results.heading(result), TITLE, "Assumed:"]
    parts[-1] += "".join(f"\n- {assumption}" for assumption in result["assumptions"])
    parts += [
        "The model of step times, fitted by three numbers to the 29 measured on a CPU (relative error, and that of "
        "the step times of 4 requests by a fit that hasn't seen them):\n" + check_table(result),
        "What stored predictions cost:\n" + cost_table(result),
    ]
    for target, machine in places(result):
        parts.append(f"{target} on {machine}: speed-up over no speculation\n" + speed_table(result, target, machine))
    parts.append(
        f"From which batch on a method speeds decoding up by less than {pays(result):g}:\n" + end_table(result)
    )
    parts.append("The same where the assumptions differ, all traffic:\n" + sensitivity_table(result))
    parts.append(
        "By the longest draft, which every request takes the positions of: speed-up, geometric mean over targets and "
        "machines, and the lowest of them where the assumptions differ:\n" + width_table(result)
    )
    return "\n\n".join(parts)


def pays(result: Mapping[str, Any]) -> float:
    """The speed-up that a method must reach to pay."""
    return result["metadata"]["conditions"]["pays"]


def places(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The targets and machines that there are rows of."""
    return list(dict.fromkeys((row["target"], row["machine"]) for row in result["rows"]))


def select(result: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values; of the first mode and all traffic unless others are asked for."""
    wanted = {"mode": result["rows"][0]["mode"], "traffic": result["rows"][0]["traffic"]} | wanted
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def speed_table(result: Mapping[str, Any], target: str, machine: str) -> str:
    """By batch: speed-ups, drafts, and how long drafting may take."""
    chosen = select(result, target=target, machine=machine)
    labels = list(chosen[0]["methods"])
    rows = []
    for row in chosen:
        methods = row["methods"]
        aasd = methods["aasd"]
        rows.append(
            [f"{row['batch']}" + ("" if row["fits"] else " (too many for its memory)")]
            + [f"{row['plain_step_ms']:.1f}", str(row["longest_draft"])]
            + [results.number(methods[label]["speed_up"]) for label in labels]
            + [results.number(methods[label]["with_prefill"]) for label in labels]
            + [results.number(aasd["mal"]), results.number(aasd["drafted_per_step"])]
            + [results.number(aasd["drafting_may_take_ms"], 1)]
        )
    header = ["requests", "step, ms", "longest draft", *(f"{label}: decode" for label in labels)]
    header += [f"{label}: with prefill" for label in labels]
    return results.table([*header, "aasd: MAL", "drafted/step", "drafting may take, ms"], rows)


def end_table(result: Mapping[str, Any]) -> str:
    """Where each method stops paying, by target, machine and traffic."""
    rows = []
    for target, machine in places(result):
        for traffic in dict.fromkeys(row["traffic"] for row in result["rows"]):
            chosen = select(result, target=target, machine=machine, traffic=traffic)
            if chosen:
                rows.append(
                    [target, machine, traffic, *(stops(chosen, label, pays(result)) for label in chosen[0]["methods"])]
                )
    return results.table(["target", "machine", "traffic", *result["rows"][0]["methods"]], rows)


def stops(rows: list[dict[str, Any]], label: str, bar: float) -> str:
    """The smallest batch from which on a method never reaches the bar."""
    paying = [row["batch"] for row in rows if row["methods"][label]["speed_up"] >= bar]
    beyond = [row["batch"] for row in rows if not paying or row["batch"] > max(paying)]
    return str(min(beyond)) if beyond else f"beyond {max(row['batch'] for row in rows)}"


def sensitivity_table(result: Mapping[str, Any]) -> str:
    """Speed-ups of decoding by mode."""
    rows = []
    for target, machine in places(result):
        for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
            chosen = select(result, target=target, machine=machine, mode=mode)
            for label in ("ngram", "aasd"):
                rows.append([target, machine, mode, label]
                            + [results.number(row["methods"][label]["speed_up"]) for row in chosen])  # fmt: skip
    batches = [str(row["batch"]) for row in select(result, target=target, machine=machine)]
    return results.table(["target", "machine", "step times", "method", *batches], rows)


def width_table(result: Mapping[str, Any]) -> str:
    """Speed-ups by batch and longest draft; the one that it begins with is marked."""
    rows = []
    for batch in dict.fromkeys(row["batch"] for row in result["fixed_lengths"]):
        found = widths(result, batch)
        cells = [f"{one['mean']:.2f} [{one['lowest']:.2f}]" + (" *" if one["first"] else "") for one in found]
        rows.append([str(batch), *cells])
    return results.table(["requests (*: at first)", *(f"{one['length']} tokens" for one in found)], rows)


def widths(result: Mapping[str, Any], batch: int) -> list[dict[str, Any]]:
    """Of a batch, by longest draft: ``length``, whether it is the ``first``, the geometric ``mean`` of speed-ups in the first
    mode, and the ``lowest`` in any.
    """
    found = []
    for row in result["fixed_lengths"]:
        if row["batch"] == batch:
            speeds = list(row["speed_up"].values())
            mean, lowest = statistics.geometric_mean(speeds[0]), min(map(min, speeds))
            found.append({"length": row["length"], "first": row["first"], "mean": mean, "lowest": lowest})
    return found


def check_table(result: Mapping[str, Any]) -> str:
    """How far the model is from the measured curve."""
    rows = []
    for mode, found in result["check"].items():
        cells = [
            f"{100 * of[key]:.0f} %" for of in (found, found["predicted"]) for key in ("mean_error", "largest_error")
        ]
        rows.append([mode, *cells])
    return results.table(["", "mean", "largest", "unseen: mean", "unseen: largest"], rows)


def cost_table(result: Mapping[str, Any]) -> str:
    """What alignment costs."""
    rows = [
        [entry["target"], entry["machine"], f"{entry['prefill_ms']:.1f}", f"{entry['prompt_alignment_ms']:.2f}",
         f"{100 * entry['prompt_alignment_share']:.1f} %",
         f"{entry['store_bytes_per_token']} of {entry['kv_bytes_per_token']}"]
        for entry in result["targets"]
    ]  # fmt: skip
    header = ["target", "machine", "prefill, ms", "predictions at its positions, ms", "share", "bytes a token, of KV"]
    return results.table(header, rows)
