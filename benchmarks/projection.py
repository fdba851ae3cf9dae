"""A projection, not a measurement: the speed-up that accelerators would allow, from acceptance measured here.

    python -m benchmarks.projection --data question.jsonl hotpotqa.jsonl --builtin

No GPU has run this. Two halves are put together:

- step times of an 8B and a 32B target on H100 and MI300X, computed from bytes and operations
  (`benchmarks.roofline`), at stated efficiencies. The model is first held against the step times that were
  measured on a CPU (`benchmarks.measured_curve`), and its error printed;
- acceptance: answers of the small demo model, recorded here and replayed by the served drafter in batches of 1 to
  256. As the V2 model runner serves it, a step is as wide for every request as the longest draft may be, which the
  scheduler learns (`vllm_aasd.drafting.widths`): here the best there is. It begins by the number of requests
  (`DRAFT_SCHEDULE`); what other widths would do shows how that was chosen. Beside it stand lengths
  chosen by `draft_lengths` on the computed step times, as the V1 model runner chooses them on those that it measures.
  That a large model's answers lean on their input as these do is an assumption too.

Every assumption stands in the result's ``assumptions``, and is printed.
"""

import argparse
import itertools
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measured_curve, projection_report, replay, results, traces
from benchmarks.drafter_quality import MIN_SURVIVAL, load_prior
from benchmarks.engine import EngineError, progress_line
from benchmarks.ngram import NgramDrafter
from benchmarks.roofline import (
    Machine,
    Target,
    most_requests,
    prefill_time,
    prompt_alignment_time,
    step_time,
)
from vllm_aasd.config import DRAFT_SCHEDULE, NUM_SPECULATIVE_TOKENS
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.drafting.lengths import draft_lengths
from vllm_aasd.kernels.draft import Prior
from vllm_aasd.tuning.json_lines import DataError

TARGETS = (
    Target("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Target("Qwen2.5-32B", 64, 5120, 40, 8, 128, 27648, 152064),
)

PEAKS = {"H100 SXM": (3.35e12, 989e12, 80e9), "MI300X": (5.3e12, 1307e12, 192e9)}
"""Bytes a second, dense bfloat16 operations a second, bytes of memory, by the makers' data sheets."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

BANDWIDTH_EFFICIENCY = 0.8
ARITHMETIC_EFFICIENCY = 0.6
LOW_ARITHMETIC_EFFICIENCY = 0.3
MEMORY_SHARE = 0.9
STEP_OVERHEAD = 0.5e-3
REQUEST_OVERHEAD = 5e-6
DRAFTING = 0.1e-3
CONTEXT = 1024
ANSWER = 256
PLAIN_LOGIT_PASSES = 3
ALIGNED_LOGIT_PASSES = 4
PAYS = 1.05
"""Speed-up below which a method is said to pay no more."""

NGRAM, SERVED, ALIGNED, BY_TIME = "ngram", "aasd", "aasd, prompt positions", "aasd, lengths by step time"
"""The methods. The last is not served on GPUs: what there is to gain by it."""

FIXED_LENGTHS = (0, 1, 2, 3, 4, 6, 8)
"""Draft lengths of which the schedule to begin with was chosen."""

LEANING = ("summarization", "rag", "hotpotqa", "code_infile", "code_crossfile", "quote", "edit")
"""Categories whose answers lean on their input."""

ASSUMPTIONS = (
    f"{BANDWIDTH_EFFICIENCY:.0%} of the peak bandwidth and {ARITHMETIC_EFFICIENCY:.0%} of the peak arithmetic are "
    "reached, whatever the batch",
    "memory and arithmetic don't overlap (the form that follows the measured CPU curve); 'full overlap' and "
    f"{LOW_ARITHMETIC_EFFICIENCY:.0%} arithmetic stand beside it",
    f"{STEP_OVERHEAD * 1e3:g} ms of every step and {REQUEST_OVERHEAD * 1e6:g} us per request aren't hidden: "
    "launches, scheduling, input preparation",
    f"drafting takes {DRAFTING * 1e3:g} ms a step for either drafter, whatever the batch; not measured on a GPU. "
    "The table says how long it may take",
    f"logits go over the bus {PLAIN_LOGIT_PASSES} times in float32, and once more with aasd, which keeps the likeliest",
    f"bfloat16 weights, keys and values on one device; {CONTEXT} tokens of context per request; no prefill in the "
    f"decode figures; 'with prefill' is a prompt of {CONTEXT} tokens and an answer of {ANSWER}",
    "acceptance is that of SmolLM2-135M-Instruct's greedy answers of up to 96 tokens, verified strictly, with its "
    "prior; a larger model's answers may repeat their input more or less",
    "'aasd' is what is served: with asynchronous scheduling every request takes as many positions of a step as the "
    "longest draft, which is the best of 0, 1, 2, 4 and 8, as if the scheduler had learnt that exactly and looked at no "
    "other; drafts end earlier by their survival",
    f"'{BY_TIME}' is not served on GPUs: drafts take only their own positions, and lengths are chosen on the computed "
    "step times, as if they were known exactly; 'ngram' drafts take only their own positions too",
    "every batch is full; the mix of categories is the same at every batch",
)


class Mode(NamedTuple):
    """One way to compute step times."""

    name: str
    overlap: bool
    arithmetic: float


class WholeDrafts(NamedTuple):
    """Batches in which drafts are verified as they are.

    Attributes:
        ngram: of vLLM's n-grams.
        served: of ours, by method and longest draft.
    """

    ngram: list[replay.Step]
    served: dict[str, dict[int, list[replay.Step]]]


MODES = (
    Mode("no overlap", False, ARITHMETIC_EFFICIENCY),
    Mode("full overlap", True, ARITHMETIC_EFFICIENCY),
    Mode("no overlap, slow arithmetic", False, LOW_ARITHMETIC_EFFICIENCY),
)


def main() -> None:
    """Project, write the result, print its tables."""
    arguments = _arguments()
    if arguments.show:
        print(projection_report.report(results.read(arguments.show)))
        return
    results.require_model(arguments)
    try:
        prior = load_prior(arguments.model)
        recordings = traces.recorded(traces.measured_tasks(arguments), arguments)
    except (DataError, EngineError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    result = {
        "metadata": results.metadata(
            **results.conditions(arguments),
            num_prompts={name: len(of) for name, of in replay.by_category(recordings).items()},
            num_draft_tokens=NUM_SPECULATIVE_TOKENS,
            min_survival=MIN_SURVIVAL,
            ngram=NgramDrafter.num_draft_tokens,
            pays=PAYS,
        ),
        "assumptions": list(ASSUMPTIONS),
        "check": {
            "no overlap": measured_curve.check(overlap=False),
            "full overlap": measured_curve.check(overlap=True),
        },
        "targets": [alignment_cost(target, name) for target in TARGETS for name in PEAKS],
        "rows": rows(recordings, prior, arguments.batches),
        "fixed_lengths": fixed_lengths(recordings, prior),
    }
    results.write(arguments.out, result)
    print(projection_report.report(result))


def machine(name: str, mode: Mode) -> Machine:
    """An accelerator at the assumed efficiencies."""
    bandwidth, arithmetic, memory = PEAKS[name]
    return Machine(
        name,
        bandwidth * BANDWIDTH_EFFICIENCY,
        arithmetic * mode.arithmetic,
        STEP_OVERHEAD,
        REQUEST_OVERHEAD,
        mode.overlap,
        memory * MEMORY_SHARE,
    )


def alignment_cost(target: Target, name: str) -> dict[str, Any]:
    """What the stored predictions cost: the prompt's lm_head against its prefill, and memory."""
    device = machine(name, MODES[0])
    prefill = prefill_time(target, device, CONTEXT)
    return {
        "target": target.name,
        "machine": name,
        "prefill_ms": prefill * 1e3,
        "prompt_alignment_ms": prompt_alignment_time(target, device, CONTEXT) * 1e3,
        "prompt_alignment_share": prompt_alignment_time(target, device, CONTEXT) / prefill,
        "store_bytes_per_token": 4 * (1 + 2 * replay.TOP_K),
        "kv_bytes_per_token": target.kv_bytes,
        "most_requests": most_requests(target, device, CONTEXT),
    }


def rows(recordings: list[replay.Trace], prior: Prior, batches: list[int]) -> list[dict[str, Any]]:
    """A row per mode, target, machine, traffic and batch: the modes but the first for all traffic alone."""
    mixes = {
        "all": recordings,
        "leaning on their input": [trace for trace in recordings if trace.category in LEANING],
        "free answers": [trace for trace in recordings if trace.category not in LEANING],
    }
    cases = [
        (mode, target, name, mix, batch)
        for mode in MODES
        for target in TARGETS
        for name in PEAKS
        for mix in mixes
        if mode is MODES[0] or mix == "all"
        for batch in batches
        if mixes[mix]
    ]
    whole: dict[tuple[str, int], WholeDrafts] = {}
    found = []
    began = time.monotonic()
    for number, (mode, target, name, mix, batch) in enumerate(cases):
        left = (time.monotonic() - began) / max(number, 1) * (len(cases) - number)
        progress_line(f"case {number + 1} of {len(cases)}, about {left / 60:.0f} min left")
        if (mix, batch) not in whole:
            whole[mix, batch] = steps_of_whole_drafts(mixes[mix], prior, batch)
        row = {"mode": mode.name, "target": target.name, "machine": name, "traffic": mix, "batch": batch}
        found.append(row | project(target, machine(name, mode), mixes[mix], prior, batch, whole[mix, batch]))
    progress_line("")
    return found


def first_length(batch: int) -> int:
    """The longest draft that a batch of so many requests begins with."""
    return next((length for last, length in DRAFT_SCHEDULE if batch <= last), 0)


def served_lengths() -> list[int]:
    """The longest drafts among which the scheduler learns to choose."""
    return sorted({0, *(length for _, length in DRAFT_SCHEDULE)})


def fixed_lengths(recordings: list[replay.Trace], prior: Prior) -> list[dict[str, Any]]:
    """What longest drafts would do, at both ends of each range of the schedule.

    Returns:
        A row per batch and length: whether it is the ``first``, and ``speed_up`` of decoding by mode, for each target and
        machine.
    """
    members = [replay.generated_only(trace) for trace in recordings]
    ends = [end for last, _ in DRAFT_SCHEDULE for end in (last, last + 1)]
    found = []
    for batch in sorted({1, *ends, 2 * ends[-2]}):
        for length in FIXED_LENGTHS:
            progress_line(f"drafts of at most {length} tokens in batches of {batch}")
            steps = replay_served(members, prior, batch, length)
            speeds: dict[str, list[float]] = {mode.name: [] for mode in MODES}
            for mode, target, name in itertools.product(MODES, TARGETS, PEAKS):
                device = machine(name, mode)
                times, plain = wide_step_times(target, device, batch, length), plain_step_time(target, device, batch)
                speeds[mode.name].append(figures(steps, times, batch, plain)["speed_up"])
            first = length == first_length(batch)
            found.append({"batch": batch, "length": length, "first": first, "speed_up": speeds})
    progress_line("")
    return found


def steps_of_whole_drafts(members: list[replay.Trace], prior: Prior, batch: int) -> WholeDrafts:
    """Batches of the methods whose drafts don't depend on step times."""
    ngram = NgramDrafter(max(len(trace.token_ids) for trace in members))
    as_kept = {SERVED: [replay.generated_only(trace) for trace in members], ALIGNED: members}
    return WholeDrafts(
        replay_whole(members, batch, ngram, ngram.num_draft_tokens),
        {
            label: {length: replay_served(traces, prior, batch, length) for length in served_lengths()}
            for label, traces in as_kept.items()
        },
    )


def plain_step_time(target: Target, device: Machine, batch: int) -> float:
    """Seconds of a step without speculation."""
    return float(step_time(target, device, batch, batch, CONTEXT, PLAIN_LOGIT_PASSES))


def wide_step_times(target: Target, device: Machine, batch: int, length: int) -> np.ndarray:
    """Seconds of steps in which every request takes ``length`` positions of drafts: the same whatever is drafted.

    Returns:
        ``[batch * (length + 1) + 1]`` float64, by the tokens that are real.
    """
    width = batch * (length + 1)
    seconds = step_time(target, device, batch, width, CONTEXT, ALIGNED_LOGIT_PASSES) + (DRAFTING if length else 0.0)
    return np.full(width + 1, seconds)


def project(
    target: Target,
    device: Machine,
    members: list[replay.Trace],
    prior: Prior,
    batch: int,
    whole: WholeDrafts,
) -> dict[str, Any]:
    """The figures of one batch: by method the speed-up of decoding, and with prefill; MAL and drafts."""
    counts = np.arange(batch * (NUM_SPECULATIVE_TOKENS + 1) + 1)
    plain = plain_step_time(target, device, batch)
    with_ngram = step_time(target, device, batch, counts, CONTEXT, PLAIN_LOGIT_PASSES) + DRAFTING
    with_aasd = step_time(target, device, batch, counts, CONTEXT, ALIGNED_LOGIT_PASSES) + DRAFTING
    by_time = replay_by_time([replay.generated_only(trace) for trace in members], prior, batch, with_aasd)
    widths = {length: wide_step_times(target, device, batch, length) for length in served_lengths()}
    best = {
        label: min(widths, key=lambda length, of=of: seconds_per_token(of[length], widths[length], batch))
        for label, of in whole.served.items()
    }
    steps = {
        NGRAM: (whole.ngram, with_ngram),
        **{label: (whole.served[label][length], widths[length]) for label, length in best.items()},
        BY_TIME: (by_time, with_aasd),
    }
    prefill = prefill_time(target, device, CONTEXT)
    extra = {ALIGNED: prompt_alignment_time(target, device, CONTEXT)}
    alone = prefill + ANSWER * plain / batch
    return {
        "fits": batch <= most_requests(target, device, CONTEXT),
        "plain_step_ms": plain * 1e3,
        "longest_draft": best[SERVED],
        "methods": {
            label: figures(of, times, batch, plain)
            | {"with_prefill": alone / (prefill + extra.get(label, 0.0) + ANSWER * seconds_per_token(of, times, batch))}
            for label, (of, times) in steps.items()
        },
    }


def figures(steps: list[replay.Step], times: np.ndarray, batch: int, plain: float) -> dict[str, float]:
    """What a method did in full batches: ``speed_up`` of decoding, and how much longer drafting might take."""
    tokens = sum(step.emitted for step in steps)
    seconds = sum(times[batch + step.drafted] for step in steps)
    return {
        "speed_up": float(tokens / seconds / (batch / plain)),
        "mal": tokens / (batch * len(steps)),
        "drafted_per_step": sum(step.drafted for step in steps) / (batch * len(steps)),
        "step_ms": float(seconds / len(steps) * 1e3),
        # Longer by so much, drafting eats all that is gained.
        "drafting_may_take_ms": float((tokens * plain / batch - seconds) / len(steps) + DRAFTING) * 1e3,
    }


def seconds_per_token(steps: list[replay.Step], times: np.ndarray, batch: int) -> float:
    """Of the whole batch."""
    return float(sum(times[batch + step.drafted] for step in steps) / sum(step.emitted for step in steps))


def replay_whole(members: list[replay.Trace], batch: int, drafter: replay.Drafts, length: int) -> list[replay.Step]:
    """Batches in which drafts are verified as they are, of so many tokens at most."""
    untimed = np.ones(batch * (length + 1) + 1)
    rng, traffic = _traffic(members, batch)
    return replay.closed_loop(traffic, drafter, length, untimed, batch, replay.whole_drafts, rng).batches


def replay_served(members: list[replay.Trace], prior: Prior, batch: int, length: int) -> list[replay.Step]:
    """Batches with the served drafter, whose drafts have so many tokens at most."""
    # A drafter has room for one token at least.
    drafter = Drafter(len(prior.ids), max(length, 1), MIN_SURVIVAL, prior)
    return replay_whole(members, batch, drafter, length)


def replay_by_time(members: list[replay.Trace], prior: Prior, batch: int, times: np.ndarray) -> list[replay.Step]:
    """Batches with the served drafter and draft lengths that follow the time of a step."""
    drafter = Drafter(len(prior.ids), NUM_SPECULATIVE_TOKENS, MIN_SURVIVAL, prior)
    rng, traffic = _traffic(members, batch)
    return replay.closed_loop(traffic, drafter, NUM_SPECULATIVE_TOKENS, times, batch, draft_lengths, rng).batches


def _traffic(members: list[replay.Trace], batch: int) -> tuple[np.random.Generator, list[replay.Trace]]:
    """The same requests in the same order for every method: all of them, and at least three batches."""
    rng = np.random.default_rng(0)
    repeats = -(-3 * batch // len(members))
    return rng, [members[i] for _ in range(repeats) for i in rng.permutation(len(members))]


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, out="projection.json")
    traces.add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="default %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
