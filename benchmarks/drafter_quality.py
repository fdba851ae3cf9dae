"""The drafter's constants and its calibration, on answers that were recorded once and are replayed.

    python -m benchmarks.drafter_quality fit --model MODEL
    python -m benchmarks.drafter_quality calibration --model MODEL --data question.jsonl hotpotqa.jsonl --builtin

`fit` searches the constants of the mixture on prompts that nothing is measured on (`fitting_tasks`), for speed
at three prices of a draft token, less what the predictions are off; `calibration` measures, on other prompts,
how far predicted survival is observed acceptance, and what prior and memory add. Both write JSON.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks import replay, results
from benchmarks.engine import EngineError
from benchmarks.fitting_tasks import fitting_tasks
from benchmarks.traces import add_arguments, measured_tasks, recorded
from vllm_aasd.config import NUM_SPECULATIVE_TOKENS_V1, Settings
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, Drafter
from vllm_aasd.drafting.memory import new_memory
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.kernels.draft import MixtureWeights, Prior
from vllm_aasd.tuning.json_lines import DataError

PRICES = (0.04, 0.12, 0.33)
"""What a draft token adds to a step, measured at one request, in between, and at sixteen (`algorithm.md`)."""

NUM_DRAFT_TOKENS = NUM_SPECULATIVE_TOKENS_V1
MIN_SURVIVAL = Settings().min_survival
_STEPS = (1.4, 1.2, 1.1)
# How much speed a search gives up for an expected calibration error smaller by one.
_CALIBRATION = 0.5


def main() -> None:
    """Run one of the two commands, write the result, print it."""
    arguments = _arguments()
    if arguments.show:
        print(report(results.read(arguments.show)))
        return
    results.require_model(arguments)
    try:
        prior = load_prior(arguments.model)
        tasks = fitting_tasks() if arguments.command == "fit" else measured_tasks(arguments)
        # As served: predictions at prompt positions cost an lm_head, and aren't taken on the demo model.
        traces = [replay.generated_only(trace) for trace in recorded(tasks, arguments)]
    except (DataError, EngineError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    found = fit(traces, prior) if arguments.command == "fit" else calibration(traces, prior)
    metadata = results.metadata(
        **results.conditions(arguments),
        num_prompts={category: len(members) for category, members in replay.by_category(traces).items()},
        prices=PRICES,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        min_survival=MIN_SURVIVAL,
    )
    result = {"metadata": metadata, arguments.command: found}
    results.write(arguments.out or results.RESULTS / f"{arguments.command}.json", result)
    print(report(result))


def load_prior(model: str) -> Prior:
    """The prior that a server of this model would find.

    Raises:
        FileNotFoundError: there is none.
    """
    key = model_key(model)
    path = prior_file.cache_path(key)
    if path is None or not path.exists():
        raise FileNotFoundError(f"no prior for {model}; make it with `python -m vllm_aasd.prior {model}`")
    from transformers import AutoConfig

    return prior_file.load(path, key, AutoConfig.from_pretrained(model).vocab_size)


def run(
    traces: list[replay.Trace],
    prior: Prior | None,
    price: float,
    weights: MixtureWeights = DEFAULT_WEIGHTS,
    memory: np.ndarray | None = None,
) -> dict[str, replay.Replay]:
    """Replay each category with a drafter of its own."""
    vocab_size = max(len(prior.ids) if prior else 0, 1 + max(int(trace.token_ids.max()) for trace in traces))
    return {
        category: replay.replay(
            members,
            Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL, prior, memory, weights),
            NUM_DRAFT_TOKENS,
            price,
        )
        for category, members in replay.by_category(traces).items()
    }


def summary(found: dict[str, replay.Replay]) -> dict[str, Any]:
    """Figures of a run, means over categories: speed geometric, the others arithmetic; the ECE over all tokens."""
    runs = list(found.values())
    predicted = np.concatenate([run.predicted for run in runs])
    accepted = np.concatenate([run.accepted for run in runs])
    return {
        "speed": float(np.exp(np.mean([np.log(run.speed) for run in runs]))),
        "mal": float(np.mean([run.emitted / run.steps for run in runs])),
        "drafted_per_step": float(np.mean([run.drafted / run.steps for run in runs])),
        "ece": replay.reliability(predicted, accepted)["ece"],
    }


def fit(traces: list[replay.Trace], prior: Prior) -> dict[str, Any]:
    """Search the constants, one at a time, in ever smaller steps.

    Returns:
        ``weights`` found, ``start``, and the figures at each price of both.
    """

    def figures(vector: np.ndarray) -> dict[str, Any]:
        return {str(price): summary(run(traces, prior, price, unpack(vector))) for price in PRICES}

    def value(vector: np.ndarray) -> float:
        entries = figures(vector).values()
        return float(np.mean([np.log(entry["speed"]) - _CALIBRATION * entry["ece"] for entry in entries]))

    start = pack(DEFAULT_WEIGHTS)
    best, best_value = start, value(start)
    for step in _STEPS:
        for index in range(len(start)):
            for factor in (step, 1 / step):
                tried = best.copy()
                tried[index] *= factor
                if (tried_value := value(tried)) > best_value + 1e-5:
                    best, best_value = tried, tried_value
        print(f"step {step}: {best_value:.4f} {np.round(best, 2).tolist()}", file=sys.stderr, flush=True)
    return {
        "start": {"weights": start.tolist(), "figures": figures(start)},
        "found": {"weights": np.round(best, 3).tolist(), "figures": figures(best)},
    }


def pack(weights: MixtureWeights) -> np.ndarray:
    """The constants that are fitted, as one vector; those of the memory aren't."""
    return np.concatenate([weights.theta, weights.alignment, [weights.doubt]]).astype(float)


def unpack(vector: np.ndarray) -> MixtureWeights:
    """The constants of a vector."""
    orders = len(DEFAULT_WEIGHTS.theta)
    return DEFAULT_WEIGHTS._replace(
        theta=vector[:orders].astype(np.float32),
        alignment=np.minimum(vector[orders : 2 * orders], 0.98).astype(np.float32),
        doubt=np.float32(vector[-1]),
    )


def calibration(traces: list[replay.Trace], prior: Prior) -> dict[str, Any]:
    """Reliability of the served drafter per category, and what its parts add, at each price."""
    served = {price: run(traces, prior, price) for price in PRICES}
    first = served[PRICES[0]]
    reliabilities = {category: replay.reliability(entry.predicted, entry.accepted) for category, entry in first.items()}
    reliabilities["all"] = replay.reliability(
        np.concatenate([entry.predicted for entry in first.values()]),
        np.concatenate([entry.accepted for entry in first.values()]),
    )
    # One memory for all: it learns from each request for those behind it, whatever their category.
    memories = {price: new_memory(prior) for price in PRICES}
    return {
        "reliability": reliabilities,
        "parts": {
            "retrieval": {str(price): summary(run(traces, None, price)) for price in PRICES},
            "with prior": {str(price): summary(entry) for price, entry in served.items()},
            "with prior and memory": {
                str(price): summary(run(traces, prior, price, memory=memories[price])) for price in PRICES
            },
        },
    }


def report(result: dict[str, Any]) -> str:
    """The tables of a result."""
    if "fit" in result:
        rows = [
            [name, price, *(f"{figures[key]:.3f}" for key in ("speed", "mal", "drafted_per_step", "ece"))]
            for name, entry in result["fit"].items()
            for price, figures in entry["figures"].items()
        ]
        table = results.table(["constants", "price", "speed", "MAL", "drafted per step", "ECE"], rows)
        return f"{table}\n\nfound: {result['fit']['found']['weights']}"
    found = result["calibration"]
    rows = [
        [category, f"{entry['ece']:.3f}", str(sum(bin_["count"] for bin_ in entry["bins"]))]
        + [f"{bin_['predicted']:.2f}: {bin_['accepted']:.2f}" for bin_ in entry["bins"]]
        for category, entry in found["reliability"].items()
    ]
    widest = max(len(row) for row in rows)
    header = ["category", "ECE", "tokens", *["predicted: accepted"] * (widest - 3)]
    parts = [
        [name, price, *(f"{figures[key]:.3f}" for key in ("speed", "mal", "drafted_per_step", "ece"))]
        for name, by_price in found["parts"].items()
        for price, figures in by_price.items()
    ]
    return "\n\n".join(
        (
            results.table(header, [row + [""] * (widest - len(row)) for row in rows]),
            results.table(["drafter", "price", "speed", "MAL", "drafted per step", "ECE"], parts),
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "calibration"))
    add_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, help="result file (default: benchmarks/results/COMMAND.json)")
    parser.add_argument("--show", type=pathlib.Path, metavar="FILE", help="only print the tables of a result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
