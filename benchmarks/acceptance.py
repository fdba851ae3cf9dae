"""Acceptance: how many tokens a decode step of the real engine emits, by method and category.

    python -m benchmarks.acceptance --data question.jsonl
    python -m benchmarks.acceptance --data question.jsonl --methods none ngram \\
        --aasd '{"aasd_min_survival": 0.05, "aasd_verification": "strict"}' --aasd '{}'

First turns through the model's chat template, greedy. Acceptance doesn't depend on speed, so a busy machine
measures it as well as a quiet one. Before any figure of an exact method is printed, its answers are compared
with
those of `none`: where they part, both tokens must be nearly as likely (see `NEAR_TIE`), for two runs of one
model in bfloat16 batch their rows differently and round differently.
"""

import argparse
import sys
from typing import Any

from benchmarks import methods, results, steps, workload
from benchmarks.data import GROUPS
from benchmarks.methods import METHODS, NEAR_TIE


def main() -> None:
    """Run the methods asked for, write the result, print its tables."""
    parser = results.arguments(__doc__, out="acceptance.json")
    workload.add_arguments(parser, limit=40, dtype="bfloat16")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["none", "ngram", "suffix", "aasd"])
    parser.add_argument(
        "--aasd",
        action="append",
        default=[],
        type=methods.settings,
        metavar="JSON",
        help="aasd with these settings",
    )
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    chosen = chosen_methods(arguments)
    work = workload.Workload(arguments)
    # The reference of the exactness check, so always run.
    plain = work.generate("none", None, logprobs=5)
    result = {
        "metadata": work.metadata(near_tie_nats=NEAR_TIE[arguments.dtype]),
        "methods": {},
        "inexact": {},
    }
    for label, speculative_config in chosen.items():
        answers = plain if speculative_config is None else work.generate(label, speculative_config)
        exactness = compare(plain, answers) if methods.is_exact(speculative_config) else None
        if exactness is not None and exactness["largest_gap_nats"] > NEAR_TIE[arguments.dtype]:
            result["inexact"][label] = {"speculative_config": speculative_config, "exactness": exactness}
        else:
            result["methods"][label] = {
                "speculative_config": speculative_config,
                "exactness": exactness,
                **figures(answers, work),
            }
        results.write(arguments.out, result)
    print(tables(result))
    if result["inexact"]:
        sys.exit(1)


def chosen_methods(arguments: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """The speculative config of each run, by label; suffix is left out where it isn't installed."""
    return methods.chosen(methods.without_missing(arguments.methods), arguments.aasd)


def compare(plain: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare answers with those of plain decoding, which have logprobs.

    Returns:
        ``num_different`` answers, and ``largest_gap_nats``: at the first token that differs, by how much the
        target finds its own token likelier than the other; infinite if the other isn't among its likeliest,
        or if one answer goes on where the other has ended.
    """
    gaps = []
    for one, other in zip(plain, answers, strict=True):
        ours, theirs = one["token_ids"], other["token_ids"]
        if ours == theirs:
            continue
        shared = min(len(ours), len(theirs))
        first = next((i for i in range(shared) if ours[i] != theirs[i]), None)
        if first is None:
            gaps.append(float("inf"))
            continue
        at = one["logprobs"][first]
        # JSON has made strings of the token ids.
        gaps.append(at[str(ours[first])] - at.get(str(theirs[first]), float("-inf")))
    return {"num_different": len(gaps), "largest_gap_nats": max(gaps, default=0.0), "gaps_nats": sorted(gaps)}


def figures(answers: list[dict[str, Any]], work: workload.Workload) -> dict[str, Any]:
    """Acceptance by category and over all, with each question's counts."""
    counts = [steps.count(a["emitted"], a["draft_tokens"], a["accepted_tokens"]) for a in answers]
    by_group = {}
    for group in GROUPS:
        members = [index for index, other in enumerate(work.groups) if other == group]
        by_group[group] = steps.acceptance([counts[index] for index in members], [group] * len(members))
    questions = [
        {"question_id": question.question_id, "category": question.category, "prompt_tokens": len(prompt)}
        | count._asdict()
        for question, prompt, count in zip(work.questions, work.prompts, counts, strict=True)
    ]
    return {"mean": steps.acceptance(counts, work.groups), "groups": by_group, "questions": questions}


def tables(result: dict[str, Any]) -> str:
    """The result as text."""
    runs = result["methods"]
    by_group = [
        [label, *(results.number(run["groups"][group]["mal"]["value"]) for group in GROUPS)]
        + [results.interval(run["mean"]["mal"]), results.interval(run["mean"]["mal_per_question"])]
        for label, run in runs.items()
    ]
    by_step = [
        [label, *(results.number(run["mean"][key]) for key in ("drafted_per_step", "accepted_per_step"))]
        + [results.number(run["mean"]["acceptance_rate"]), _exactness(run["exactness"])]
        for label, run in runs.items()
    ]
    return "\n".join(
        (
            results.heading(result),
            "",
            "Mean acceptance length: tokens per decode step, by category; their mean with a 95% interval,",
            "pooled in each category and as the mean of the questions' own.",
            results.table(["method", *GROUPS, "mean", "mean of questions"], by_group),
            "",
            results.table(
                ["method", "drafted/step", "accepted/step", "acceptance rate", "exactness"], by_step
            ),
            *(
                f"\nNO FIGURES for {label}, which promises exact answers: {_exactness(run['exactness'])}"
                for label, run in result["inexact"].items()
            ),
        )
    )


def _exactness(exactness: dict[str, Any] | None) -> str:
    if exactness is None:
        return "not promised"
    if not exactness["num_different"]:
        return "equal to none"
    gap = exactness["largest_gap_nats"]
    return f"{exactness['num_different']} part from none, at gaps of up to {gap:.2g} nats"


if __name__ == "__main__":
    main()
