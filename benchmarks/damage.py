"""Damage: what verification policies gain, and what they do to the answers.

    python -m benchmarks.damage --data question.jsonl
    python -m benchmarks.damage --data question.jsonl --limit 40 \\
        --settings '{"aasd_verification": "typical"}' '{"aasd_verification": "typical", "aasd_collapse_guard": false}' \\
        --common '{"aasd_draft": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}'

A lossy rule accepts tokens that the target would not have chosen, and much of what a loose one gains is the
model copying its prompt. So every setting is judged beside `strict` with the same drafter, whose answers are
the target's own, by figures that show it; the likelihood of an answer doesn't. In float32 strict equals plain
decoding, so any difference is the rule's; in bfloat16 near ties fall either way, and the row `strict` against
`none` tells how much of a difference means nothing.
"""

import argparse
import json
from typing import Any

from benchmarks import results, steps, workload
from benchmarks.acceptance import compare
from benchmarks.methods import METHODS, NEAR_TIE, label
from vllm_aasd.tuning import statistics

UNGUARDED = {"aasd_collapse_guard": False}
REIMPLEMENTATION = {"aasd_verification": "conditional", "aasd_alpha": 0.1, "aasd_beta": 0.1, "aasd_floor": 1e-4}
"""The bar of the public re-implementation, which has no floor: this is the lowest that we allow."""

SETTINGS = tuple(
    rule | guard
    for rule in (
        {"aasd_verification": "conditional"},
        REIMPLEMENTATION,
        {"aasd_verification": "typical"},
        {"aasd_verification": "fly"},
        {"aasd_verification": "budget"},
    )
    for guard in ({}, UNGUARDED)
)

COPIED_SPAN = 8
REPEATED_SPAN = 4

COLUMNS = {
    "mal": "MAL",
    "not_argmax": "not the argmax, %",
    "rouge_l": "ROUGE-L to strict",
    "equal": "answers equal to strict, %",
    "copied": "copied, %",
    "repeated": "repeated, %",
    "logprob": "nats per token",
}
"""Figure, heading. What each is: see `figures`."""


def main() -> None:
    """Run every setting, write the result, print its table."""
    parser = results.arguments(__doc__, out="damage.json")
    workload.add_arguments(parser, limit=8, dtype="bfloat16")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=_keys,
        default=SETTINGS,
        metavar="JSON",
        help="keys of --speculative-config to be judged, one object for each row",
    )
    parser.add_argument(
        "--common", type=_keys, default={}, metavar="JSON", help="keys of all rows, strict included: the drafter's"
    )
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    work = workload.Workload(arguments)
    plain = work.generate("none", None, logprobs=5)
    common = METHODS["aasd"] | arguments.common
    strict = work.generate("strict", common | {"aasd_verification": "strict"})
    exactness = compare(plain, strict)
    result = {
        "metadata": work.metadata(near_tie_nats=NEAR_TIE[arguments.dtype]),
        "exactness": exactness,
        "settings": {},
    }
    if exactness["largest_gap_nats"] > NEAR_TIE[arguments.dtype]:
        results.write(arguments.out, result)
        parser.exit(1, f"strict isn't exact, no figures: {exactness}\n")
    runs = {"none": (None, plain), "strict": (None, strict)}
    for keys in arguments.settings:
        name = label(keys).removeprefix("aasd ").removeprefix("verification=")
        runs[name] = keys, work.generate(name, common | keys)
    scores = score_each_once(work, [answers for _, answers in runs.values()])
    for (name, (keys, answers)), scored in zip(runs.items(), scores, strict=True):
        result["settings"][name] = {"setting": keys, **figures(answers, strict, scored, work)}
    results.write(arguments.out, result)
    print(tables(result))


def score_each_once(
    work: workload.Workload, runs: list[list[dict[str, Any]]]
) -> list[list[list[tuple[float, float]]]]:
    """The target's own logprobs of all answers of all runs, by one engine.

    Returns:
        Per run, question and token, the token's logprob and that of the likeliest token there.
    """
    # By question and answer, for many settings give the same answers.
    places = [[(i, *answer["token_ids"]) for i, answer in enumerate(answers)] for answers in runs]
    different = list(dict.fromkeys(place for run in places for place in run))
    scored = work.score(
        "scoring", [(work.prompts[question], list(answer)) for question, *answer in different]
    )
    known = dict(zip(different, scored, strict=True))
    return [[known[place] for place in run] for run in places]


def figures(
    answers: list[dict[str, Any]],
    strict: list[dict[str, Any]],
    scored: list[list[tuple[float, float]]],
    work: workload.Workload,
) -> dict[str, Any]:
    """What a setting gained and what it did, each the mean over categories with its interval.

    Returns:
        - ``mal``: tokens per decode step;
        - ``not_argmax``: share of emitted tokens that the target, given the same prefix, finds less likely
        than
          another token. Judged by teacher forcing, which rounds differently in bfloat16: the row `none` shows
          how much of it is that;
        - ``rouge_l``: ROUGE-L F1 of the answer's tokens to strict's;
        - ``equal``: share of answers that are token by token strict's;
        - ``copied``: share of emitted tokens in a run of at least `COPIED_SPAN` tokens that the prompt holds;
        - ``repeated``: share of the answer's n-grams of `REPEATED_SPAN` tokens that stood earlier in it;
        - ``logprob``: the target's mean logprob of an emitted token, in nats;
        - ``questions``: what they were computed from.
    """
    rows = []
    for question, prompt, answer, reference, score in zip(
        work.questions, work.prompts, answers, strict, scored, strict=True
    ):
        output = answer["token_ids"]
        repeats, runs = statistics.num_repeats(output, REPEATED_SPAN)
        count = steps.count(answer["emitted"], answer["draft_tokens"], answer["accepted_tokens"])
        rows.append(
            {
                "question_id": question.question_id,
                "tokens": len(output),
                "decode_steps": count.decode_steps,
                "decode_tokens": count.decode_tokens,
                "not_argmax": sum(logprob < best for logprob, best in score),
                "rouge_l": round(statistics.rouge_l(output, reference["token_ids"]), 4),
                "equal": int(output == reference["token_ids"]),
                "copied": statistics.num_copied(output, prompt, COPIED_SPAN),
                "repeated": repeats,
                "runs": runs,
                "logprob": round(sum(logprob for logprob, _ in score), 3),
            }
        )

    def mean(figure: str, by: str | None) -> dict[str, float]:
        bottom = [1 if by is None else row[by] for row in rows]
        return statistics.stratified_ratio([row[figure] for row in rows], bottom, work.groups)

    return {
        "mal": mean("decode_tokens", "decode_steps"),
        "not_argmax": mean("not_argmax", "tokens"),
        "rouge_l": mean("rouge_l", None),
        "equal": mean("equal", None),
        "copied": mean("copied", "tokens"),
        "repeated": mean("repeated", "runs"),
        "logprob": mean("logprob", "tokens"),
        "questions": rows,
    }


def tables(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = []
    for name, run in result["settings"].items():
        cells = []
        for figure, heading in COLUMNS.items():
            scale = 100 if heading.endswith("%") else 1
            scaled = {key: value * scale for key, value in run[figure].items()}
            cells.append(results.interval(scaled, 1 if scale == 100 else 2))
        rows.append([name, *cells])
    conditions, exactness = result["metadata"]["conditions"], result["exactness"]
    return "\n".join(
        (
            results.heading(result),
            f"{conditions['num_questions']} questions, {conditions['dtype']}; strict and none differ in "
            f"{exactness['num_different']} of them, gaps up to {exactness['largest_gap_nats']:.2g} nats",
            "",
            results.table(["setting", *COLUMNS.values()], rows),
        )
    )


def _keys(text: str) -> dict[str, Any]:
    try:
        keys = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} isn't JSON: {error}") from error
    if not isinstance(keys, dict):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a JSON object")
    return keys


if __name__ == "__main__":
    main()
