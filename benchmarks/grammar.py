"""Structured output: tool calls and extractions, with and without drafts of what the grammar forces.

    python -m benchmarks.grammar --model MODEL --limit 25

Each task of `benchmarks.grammar_tasks` is answered without speculation, by aasd (strict) and by aasd without forced
drafts (``aasd_grammar: false``), which take turns: one request at a time, then several at once. The answers are
compared as in `benchmarks.end_to_end`, and have to be valid.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from benchmarks import exactness, methods, results
from benchmarks.engine import Engine, EngineError
from benchmarks.grammar_tasks import GrammarTask, tasks
from benchmarks.tasks import load_tokenizer
from vllm_aasd.counters import GRAMMAR_SOURCES
from vllm_aasd.tuning import stratified_ratio

SETTINGS = {"method": "aasd", "aasd_verification": "strict"}
CASES = ("none", "aasd", "aasd, no forced drafts")
Found = dict[str, list[dict[str, Any]]]


def measure(
    engines: dict[str, Engine], chosen: Sequence[GrammarTask], prompts: Sequence[list[int]], max_tokens: int, width: int
) -> Found:
    """By case, the answers to every task, `width` at once; the cases take turns.

    Each answer has the ``seconds`` of its decoding, or its share of the seconds of all that ran at once.
    """
    found: Found = {case: [] for case in CASES}
    for number, first in enumerate(range(0, len(chosen), width)):
        for case in itertools.islice(itertools.cycle(CASES), number, number + len(CASES)):
            sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
            if case == CASES[2]:
                sampling["extra_args"] = {"aasd_grammar": False}
            requests = [
                {
                    "prompt_token_ids": prompt,
                    # No case drafts from another's answer to the same task.
                    "cache_salt": case,
                    "sampling": sampling | {"structured_outputs": {"json": json.dumps(task.schema)}},
                }
                for prompt, task in zip(prompts[first : first + width], chosen[first : first + width], strict=True)
            ]
            answers, seconds = engines["none" if case == "none" else "aasd"].run(requests)
            num_tokens = sum(len(answer["token_ids"]) for answer in answers)
            for answer in answers:
                share = seconds * len(answer["token_ids"]) / num_tokens
                answer["seconds"] = answer["last_token"] - answer["first_token"] if width == 1 else share
            found[case] += answers
        print(f"{first + width} of {len(chosen)} tasks, {width} at once", file=sys.stderr, flush=True)
    return found


def figures(found: Found, chosen: Sequence[GrammarTask]) -> dict[str, Any]:
    """By category and case: tokens per step, and how many times as fast as each other case it is."""
    by_category: dict[str, Any] = {}
    for category in dict.fromkeys(task.category for task in chosen):
        of = {
            case: [answer for answer, task in zip(answers, chosen, strict=True) if task.category == category]
            for case, answers in found.items()
        }
        groups = [category] * len(of["none"])
        emitted = {case: [len(one["token_ids"]) - 1 for one in answers] for case, answers in of.items()}
        seconds = {case: [one["seconds"] for one in answers] for case, answers in of.items()}
        by_category[category] = {
            case: {
                "answers": len(answers),
                "tokens_per_step": sum(emitted[case]) / sum(one["steps"] - 1 for one in answers),
                "speed_over": {
                    other: stratified_ratio(emitted[case], seconds[case], groups, (emitted[other], seconds[other]))
                    for other in CASES
                    if other != case
                },
            }
            for case, answers in of.items()
        }
    return by_category


def by_source(before: dict[str, float], after: dict[str, float], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the draft tokens of each source, and the scheduler's time for them."""
    grown = {name: value - before[name] for name, value in after.items()}
    kinds = "draft", "accepted", "rejected"
    found: dict[str, Any] = {
        source: {kind: grown[f"aasd:grammar_{kind}_tokens:{source}"] for kind in kinds} for source in GRAMMAR_SOURCES
    }
    num_tokens = sum(len(answer["token_ids"]) for answer in answers)
    share = sum(found[source]["accepted"] for source in ("forced", "style")) / num_tokens
    seconds = grown["aasd:grammar_seconds"]
    return found | {
        "forced_share_of_tokens": share,
        "scheduler_share_of_time": seconds / sum(answer["seconds"] for answer in answers),
        "scheduler_ms_per_step": 1000 * seconds / sum(answer["steps"] for answer in answers),
    }


def num_invalid(found: Found, chosen: Sequence[GrammarTask], tokenizer: Any, max_tokens: int) -> int:
    """How many answers that ended by themselves aren't of their schema."""
    bad = 0
    for answer, task in zip(itertools.chain(*found.values()), itertools.cycle(chosen)):
        if len(answer["token_ids"]) < max_tokens:
            text = tokenizer.decode(answer["token_ids"], skip_special_tokens=True)
            try:
                jsonschema.validate(json.loads(text), task.schema)
            except (ValueError, jsonschema.ValidationError):
                bad += 1
    return bad


def table(by_width: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        [
            width,
            category,
            case,
            results.number(of["tokens_per_step"]),
            *(results.interval(of["speed_over"].get(other)) for other in (CASES[0], CASES[2])),
        ]
        for width, by_category in by_width.items()
        for category, by_case in by_category.items()
        for case, of in by_case.items()
    ]
    header = ["at once", "category", "case", "tokens per step", "over none", "over no forced drafts"]
    return results.table(header, rows)


def main() -> None:
    """Measure, write the result, print it."""
    parser = results.arguments(__doc__, "grammar.json")
    results.add_model_argument(parser)
    parser.add_argument("--limit", type=int, default=200, help="tasks (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200, help="per answer (default %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="requests (default %(default)s)")
    parser.add_argument("--dtype", choices=methods.NEAR_TIE, default="bfloat16", help="default %(default)s")
    parser.add_argument("--core", type=int, help="the only CPU core that the engines may use")
    arguments = parser.parse_args()
    results.require_model(arguments)
    tokenizer = load_tokenizer(arguments.model)
    chosen = list(itertools.islice(tasks(), arguments.limit))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": task.system}, {"role": "user", "content": task.user}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for task in chosen
    ]
    options = {"model": arguments.model, "dtype": arguments.dtype, "max_model_len": 3000, "max_num_seqs": 8}
    options |= {"distributed_executor_backend": "uni"}
    by_width, sources = {}, {}
    verdicts: dict[str, dict[str, Any]] = {}
    try:
        with (
            Engine("none", options, arguments.core) as none,
            Engine("aasd", options | {"speculative_config": SETTINGS}, arguments.core) as aasd,
        ):
            engines = {"none": none, "aasd": aasd}
            # What is compiled or allocated at first isn't measured.
            measure(engines, chosen[-4:], prompts[-4:], 32, 1)
            for width in arguments.at_once:
                aasd.forget()
                none.forget()
                before = aasd.metrics()
                found = measure(engines, chosen, prompts, arguments.max_tokens, width)
                sources[str(width)] = by_source(before, aasd.metrics(), found["aasd"])
                bad = num_invalid(found, chosen, tokenizer, arguments.max_tokens)
                if bad:
                    sys.exit(f"no figures, nothing written: {bad} answers aren't of their schema")
                by_width[str(width)] = figures(found, chosen)
                judged = exactness.verdicts(none, prompts, found, methods.NEAR_TIE[arguments.dtype], True)
                verdicts |= {f"{case}, {width}": verdict for case, verdict in judged.items()}
    except EngineError as error:
        sys.exit(f"error: {error}")
    if exactness.failed(verdicts):
        sys.exit(f"no figures, nothing written: not exact: {verdicts}")
    result = {"metadata": results.metadata(**results.conditions(arguments)), "exactness": verdicts}
    result = results.rounded(result | {"figures": by_width, "sources": sources})
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{table(result['figures'])}\n\nExactness: {verdicts}")


if __name__ == "__main__":
    main()
