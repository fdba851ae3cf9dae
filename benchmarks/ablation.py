"""Ablation: what each part of the drafter adds, on recorded answers of the real model.

    python -m benchmarks.ablation --data question.jsonl hotpotqa.jsonl --builtin

Parts are added one after the other: retrieval alone; the stored predictions at generated positions, where they are
free, then at the prompt's too; the prior of single tokens, then of runs; the memory; the adaptive length. Up to that drafts have the fixed length of
`aasd_draft_length: 8`, then up to the 16 tokens that may be drafted by default. Replaying is exact for acceptance (strict verification gives the same greedy answer
whatever is drafted). Speed is in tokens per unit of time at three prices of a draft token, those measured on this
machine at one request, in between, and at sixteen; it leaves out what the parts themselves take (the lm_head at prompt
positions above all). The mixture's constants are the served ones for all, not fitted again without a part.
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import replay, results, traces
from benchmarks.drafter_quality import MIN_SURVIVAL, NUM_DRAFT_TOKENS, PRICES, load_prior
from benchmarks.engine import EngineError
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.drafting.lengths import draft_lengths
from vllm_aasd.drafting.memory import new_memory
from vllm_aasd.kernels.draft import Prior, no_memory
from vllm_aasd.tuning import statistics
from vllm_aasd.tuning.json_lines import DataError

FIXED_DRAFT_LENGTH = 8


class Stage(NamedTuple):
    """The drafter with some of its parts.

    Attributes:
        name: what was added to the stage before.
        seen: what it sees of a trace.
        prior, runs, memory, adaptive: whether it has them.
    """

    name: str
    seen: Callable[[replay.Trace], replay.Trace]
    prior: bool = False
    runs: bool = False
    memory: bool = False
    adaptive: bool = False


STAGES = (
    Stage("retrieval only", replay.without_predictions),
    Stage("+ alignment, generated positions", replay.generated_only),
    Stage("+ alignment, prompt positions", lambda trace: trace),
    Stage("+ prior of tokens", lambda trace: trace, prior=True),
    Stage("+ prior of runs", lambda trace: trace, prior=True, runs=True),
    Stage("+ memory", lambda trace: trace, prior=True, runs=True, memory=True),
    Stage("+ adaptive length", lambda trace: trace, prior=True, runs=True, memory=True, adaptive=True),
)


def main() -> None:
    """Replay every stage, write the result, print its table."""
    parser = results.arguments(__doc__, out="ablation.json")
    traces.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.show:
        print(report(results.read(arguments.show)))
        return
    results.require_model(arguments)
    try:
        prior = load_prior(arguments.model)
        members = traces.recorded(traces.measured_tasks(arguments), arguments)
    except (DataError, EngineError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    metadata = results.metadata(
        **results.conditions(arguments),
        num_prompts={category: len(of) for category, of in replay.by_category(members).items()},
        prices=PRICES,
        fixed_draft_length=FIXED_DRAFT_LENGTH,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        min_survival=MIN_SURVIVAL,
    )
    result = {"metadata": metadata, "stages": ablate(mixed(members), prior)}
    results.write(arguments.out, result)
    print(report(result))


def mixed(members: Sequence[replay.Trace]) -> list[replay.Trace]:
    """The traces in an order that isn't by category, as traffic comes: the memory learns from one for the next."""
    return random.Random(0).sample(list(members), len(members))


def ablate(members: Sequence[replay.Trace], prior: Prior) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures by stage and price."""
    groups = [trace.category for trace in members]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    before: dict[float, list[replay.Replay]] = {}
    for stage in STAGES:
        found[stage.name] = {}
        for price in PRICES:
            runs = run(stage, members, prior, price)
            found[stage.name][str(price)] = figures(runs, before.get(price, runs), groups)
            before[price] = runs
    return found


def run(stage: Stage, members: Sequence[replay.Trace], prior: Prior, price: float) -> list[replay.Replay]:
    """What a stage does on each trace; one drafter for all, so that a memory learns."""
    memory = new_memory(prior) if stage.memory else None
    known = prior if stage.runs else prior._replace(runs=no_memory())
    longest = NUM_DRAFT_TOKENS if stage.adaptive else FIXED_DRAFT_LENGTH
    drafter = Drafter(len(prior.ids), longest, MIN_SURVIVAL, known if stage.prior else None, memory)
    times = replay.priced(longest, price)
    lengths = draft_lengths if stage.adaptive else replay.whole_drafts
    return [replay.closed_loop([stage.seen(trace)], drafter, longest, times, 1, lengths) for trace in members]


def figures(runs: Sequence[replay.Replay], before: Sequence[replay.Replay], groups: Sequence[str]) -> dict[str, Any]:
    """Figures of a stage, each pooled by category and averaged over them.

    Args:
        runs: its replay of each trace.
        before: that of the stage before.
        groups: the traces' categories.

    Returns:
        ``mal``, ``speed`` (1 is plain decoding) and ``gain`` (speed by that of the stage before, on the same
        traces) with intervals; ``drafted_per_step``, ``acceptance_rate``.
    """
    columns = {key: [getattr(one, key) for one in runs] for key in ("emitted", "steps", "seconds", "drafted")}
    accepted = [int(one.accepted.sum()) for one in runs]
    earlier = [one.emitted for one in before], [one.seconds for one in before]
    return {
        "mal": statistics.stratified_ratio(columns["emitted"], columns["steps"], groups),
        "speed": statistics.stratified_ratio(columns["emitted"], columns["seconds"], groups),
        "gain": statistics.stratified_gain((columns["emitted"], columns["seconds"]), earlier, groups),
        "drafted_per_step": statistics.stratified_ratio(columns["drafted"], columns["steps"], groups)["value"],
        "acceptance_rate": sum(accepted) / max(sum(columns["drafted"]), 1),
    }


def report(result: dict[str, Any]) -> str:
    """The table of a result."""
    rows = [
        [name, price, results.interval(found["mal"]), results.number(found["drafted_per_step"])]
        + [f"{100 * found['acceptance_rate']:.0f} %", results.interval(found["speed"])]
        + [results.interval(found["gain"], 3)]
        for name, by_price in result["stages"].items()
        for price, found in by_price.items()
    ]
    header = ["drafter", "price of a draft token", "MAL", "drafted/step", "accepted", "speed", "by the stage before"]
    return "\n\n".join((results.heading(result), results.table(header, rows)))


if __name__ == "__main__":
    main()
