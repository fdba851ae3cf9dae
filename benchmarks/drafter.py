"""The drafter on recorded answers of the real model: its constants, its calibration, and what each part of it adds.

    python -m benchmarks.drafter fit
    python -m benchmarks.drafter calibration --data question.jsonl hotpotqa.jsonl --builtin
    python -m benchmarks.drafter ablation --data question.jsonl hotpotqa.jsonl --builtin

`fit` searches the constants of the mixture on prompts that nothing is measured on (`fitting_tasks`), for speed at
three prices of a draft token, minus what the predictions are off. `calibration` measures, on other prompts, how far
predicted survival is observed acceptance. `ablation` adds the parts one by one: the prior; earlier answers; the
adaptive draft length; alignment at generated positions, where it is free, then at the prompt's too. Acceptance is
exact; speed leaves out what the parts themselves take. The constants aren't fitted again without a part.
"""

import argparse
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import replay, report, results
from benchmarks.end_to_end import read_all
from benchmarks.engine import EngineError
from benchmarks.fitting_tasks import fitting_tasks
from benchmarks.methods import NEAR_TIE
from benchmarks.replay import Replay, Trace
from benchmarks.tasks import by_category
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, Drafter
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.engine.configuration import NUM_SPECULATIVE_TOKENS_V1 as NUM_DRAFT_TOKENS
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.kernels.draft import MixtureWeights, Prior
from vllm_aasd.tuning import stratified_ratio

PRICES = (0.04, 0.12, 0.33)
"""What a draft token adds to a step, measured at one request, in between, and at sixteen."""

MIN_SURVIVAL = 0.02
"""As served."""

FIXED_DRAFT_LENGTH = 8
ANSWER_BYTES = 64 << 20
_STEPS = (1.4, 1.2, 1.1)
# How much speed a search gives up for an expected calibration error smaller by one.
_CALIBRATION = 0.5


STAGES: dict[str, tuple[Callable[[Trace], Trace], frozenset[str]]] = {
    "retrieval only": (replay.without_predictions, frozenset()),
    "+ prior": (replay.without_predictions, frozenset({"prior"})),
    "+ earlier answers": (replay.without_predictions, frozenset({"prior", "answers"})),
    "+ adaptive length": (replay.without_predictions, frozenset({"prior", "answers", "adaptive"})),
    "+ alignment, generated positions": (replay.generated_only, frozenset({"prior", "answers", "adaptive"})),
    "+ alignment, prompt positions": (replay.unchanged, frozenset({"prior", "answers", "adaptive"})),
}
"""By name: what the drafter sees of a trace, and which parts it has."""


def main() -> None:
    """Run one of the three commands, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "calibration", "ablation"))
    results.add_model_argument(parser)
    parser.add_argument("--data", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="to measure on")
    parser.add_argument("--builtin", action="store_true", help="also the tasks that ship with Python")
    parser.add_argument("--categories", nargs="+", help="only these (default: all)")
    parser.add_argument("--limit", type=int, default=16, help="prompts per category (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer (default %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1500, help="default %(default)s")
    parser.add_argument("--dtype", choices=NEAR_TIE, default="bfloat16", help="default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, help="result file (default: benchmarks/results/COMMAND.json)")
    arguments = parser.parse_args()
    results.require_model(arguments)
    try:
        prior = load_prior(arguments.model)
        if arguments.command == "fit":
            tasks = fitting_tasks()
        else:
            tasks = [
                task
                for of in by_category(read_all(arguments), arguments.limit, arguments.categories).values()
                for task in of
            ]
        traces = replay.recorded(tasks, arguments)
    except (EngineError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    found = {"fit": fit, "calibration": calibration, "ablation": ablation}[arguments.command](traces, prior)
    metadata = results.metadata(
        **results.conditions(arguments),
        num_prompts={category: len(of) for category, of in replay.by_category(traces).items()},
        prices=PRICES,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        min_survival=MIN_SURVIVAL,
    )
    result = {"metadata": metadata, arguments.command: found}
    results.write(arguments.out or results.RESULTS / f"{arguments.command}.json", result)
    print(f"{results.heading(result)}\n\n{getattr(report, arguments.command)(result)}")


def load_prior(model: str) -> Prior:
    """The prior that a server of this model would find.

    Raises:
        FileNotFoundError: there is none.
    """
    key = model_key(model)
    path = key and prior_file.cache_path(key)
    if not key or not path or not path.exists():
        raise FileNotFoundError(f"no prior for {model}; make it with `python -m vllm_aasd.prior {model}`")
    from transformers import AutoConfig

    return prior_file.load(path, key, AutoConfig.from_pretrained(model).vocab_size)


def run(
    traces: Sequence[Trace], prior: Prior, price: float, weights: MixtureWeights = DEFAULT_WEIGHTS
) -> dict[str, Replay]:
    """Replay each category with a drafter of its own, as served where prompt positions cost too much."""
    # A test's traces may hold tokens that its prior doesn't know.
    vocab_size = max(len(prior.ids), 1 + max(int(trace.token_ids.max()) for trace in traces))
    return {
        category: replay.replay(
            map(replay.generated_only, of),
            Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL, prior, weights=weights),
            NUM_DRAFT_TOKENS,
            price,
        )
        for category, of in replay.by_category(traces).items()
    }


def summary(found: dict[str, Replay]) -> dict[str, float]:
    """Means over categories: speed geometric, the others arithmetic; the ECE over all tokens."""
    runs = list(found.values())
    predicted, accepted = (np.concatenate([getattr(one, key) for one in runs]) for key in ("predicted", "accepted"))
    return {
        "speed": float(np.exp(np.mean([np.log(one.speed) for one in runs]))),
        "mal": float(np.mean([one.emitted / one.steps for one in runs])),
        "drafted": float(np.mean([one.drafted / one.steps for one in runs])),
        "ece": replay.reliability(predicted, accepted)["ece"],
    }


def fit(traces: Sequence[Trace], prior: Prior) -> dict[str, Any]:
    """Search the constants, one at a time, in ever smaller steps.

    Returns:
        ``start`` and ``found``, each with ``weights`` and the ``figures`` by price.
    """

    def figures(vector: np.ndarray) -> dict[str, dict[str, float]]:
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
    return np.concatenate([weights.theta, weights.alignment, [weights.no_alignment_discount]]).astype(float)


def unpack(vector: np.ndarray) -> MixtureWeights:
    """The constants of a vector."""
    orders = len(DEFAULT_WEIGHTS.theta)
    return DEFAULT_WEIGHTS._replace(
        theta=vector[:orders].astype(np.float32),
        alignment=np.minimum(vector[orders : 2 * orders], 0.98).astype(np.float32),
        no_alignment_discount=np.float32(vector[-1]),
    )


def calibration(traces: Sequence[Trace], prior: Prior) -> dict[str, Any]:
    """`replay.reliability` of the served drafter per category and of ``all``, at the lowest price."""
    found = run(traces, prior, PRICES[0])
    rows = {category: (one.predicted, one.accepted) for category, one in found.items()}
    predicted, accepted = (np.concatenate(column) for column in zip(*rows.values(), strict=True))
    rows["all"] = predicted, accepted
    return {category: replay.reliability(*row) for category, row in rows.items()}


def ablation(traces: Sequence[Trace], prior: Prior) -> dict[str, dict[str, Any]]:
    """The figures by stage and price: ``mal``, ``speed``, and ``gain`` in speed over the stage before."""
    # Not by category, as traffic comes: earlier answers serve later requests.
    mixed = random.Random(0).sample(list(traces), len(traces))
    groups = [trace.category for trace in mixed]
    found: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    for price in PRICES:
        before = None
        for name in STAGES:
            runs = run_stage(name, mixed, prior, price)
            emitted, steps, seconds, drafted = (
                [getattr(one, key) for one in runs] for key in ("emitted", "steps", "seconds", "drafted")
            )
            found[name][str(price)] = {
                "mal": stratified_ratio(emitted, steps, groups),
                "drafted": stratified_ratio(drafted, steps, groups)["value"],
                "acceptance_rate": sum(int(one.accepted.sum()) for one in runs) / max(sum(drafted), 1),
                "speed": stratified_ratio(emitted, seconds, groups),
                "gain": stratified_ratio(emitted, seconds, groups, before or (emitted, seconds)),
            }
            before = emitted, seconds
    return found


def run_stage(name: str, traces: Sequence[Trace], prior: Prior, price: float) -> list[Replay]:
    """What a stage does on each trace; one drafter for all, so that answers serve later requests."""
    seen, parts = STAGES[name]
    longest = NUM_DRAFT_TOKENS if "adaptive" in parts else FIXED_DRAFT_LENGTH
    known = prior if "prior" in parts else None
    drafter = Drafter(len(prior.ids), longest, MIN_SURVIVAL, known, texts=KnownTexts(ANSWER_BYTES, longest))
    lengths = replay.adaptive_drafts if "adaptive" in parts else replay.whole_drafts
    namespace = 0 if "answers" in parts else None
    return [replay.replay([seen(trace)], drafter, longest, price, lengths, namespace) for trace in traces]


if __name__ == "__main__":
    main()
