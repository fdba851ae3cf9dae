"""Quality: what each verification rule gains in speed, and what it does to the answers.

    python -m benchmarks.quality --data question.jsonl hotpotqa.jsonl HumanEval.jsonl.gz

What `python -m vllm_aasd.tune` does for a user's own prompts, on published questions: one engine, every rule with its
guard and some without, plain sampling for comparison, everything held against greedy decoding without speculation. A
lossy rule accepts tokens that the target would not have chosen, and much of what a loose one gains is the model
copying its prompt: agreement, copying and repetition show it. In float32 strict equals plain decoding, so any
difference is the rule's.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import report, results
from benchmarks.scores import score
from benchmarks.tasks import Task, by_category, load_tokenizer, read_tasks, tokenize
from vllm_aasd import tune

SAMPLED = "no speculation, sampled at 0.7, top-p 0.9"
UNGUARDED = {"aasd_collapse_guard": False}
WAYS: dict[str, dict[str, Any]] = {
    tune.OFF: {"aasd_enabled": False},
    tune.STRICT: {"aasd_verification": "strict"},
    SAMPLED: {"aasd_enabled": False},
    "conditional": {"aasd_verification": "conditional"},
    "conditional, no guard": {"aasd_verification": "conditional", **UNGUARDED},
    "conditional, beta 0.1, no guard": {"aasd_verification": "conditional", "aasd_beta": 0.1, **UNGUARDED},
    "fly": {"aasd_verification": "fly"},
    "fly, no guard": {"aasd_verification": "fly", **UNGUARDED},
    "budget": {"aasd_verification": "budget"},
}
BOUNDS = {"rouge_l": 0.9, "copied": 0.02, "repeated": 0.02}


def main() -> None:
    """Run every rule, write the result, print its table."""
    parser = results.arguments(__doc__, "quality.json")
    results.add_model_argument(parser)
    parser.add_argument(
        "--data", type=pathlib.Path, nargs="+", required=True, metavar="FILE", help="see benchmarks.tasks"
    )
    parser.add_argument("--limit", type=int, default=8, help="questions of each category (default %(default)s)")
    parser.add_argument("--categories", nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--rules", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="RULE", help=f"of {', '.join(WAYS)}"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer (default %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1500, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is timed (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.epilog = "All other arguments are those of vLLM's engine, such as --gpu-memory-utilization 0.5."
    arguments, of_vllm = parser.parse_known_args()
    results.require_model(arguments)
    try:
        result = measure(arguments, of_vllm)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    equal = result["runs"][tune.STRICT]["equal"]["value"]
    if arguments.dtype == "float32" and equal < 1:
        sys.exit(f"no figures, nothing written: strict isn't exact, {equal:.1%} of its answers are plain decoding's")
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{report.quality(result)}\n\n{report.scores(result)}")


def measure(arguments: argparse.Namespace, of_vllm: list[str]) -> dict[str, Any]:
    """Answer everything in every way; see `vllm_aasd.tune.compare` for what is returned besides the metadata."""
    read = [task for path in arguments.data for task in read_tasks(path)]
    tasks = [task for members in by_category(read, arguments.limit, arguments.categories).values() for task in members]
    tokenizer = load_tokenizer(arguments.model)
    prompts = [
        tune.Prompt(token_ids, task.category, scorer(task, tokenizer))
        for task, token_ids in zip(tasks, tokenize(tokenizer, tasks, arguments.max_prompt_tokens), strict=True)
    ]

    from vllm_aasd.engine.trial import Trial

    length = arguments.max_prompt_tokens + arguments.max_tokens
    engine = ["--dtype", arguments.dtype, "--max-num-seqs", str(arguments.concurrency), "--max-model-len", str(length)]
    trial = Trial(arguments.model, [*engine, *of_vllm])
    sampling = {SAMPLED: {"temperature": 0.7, "top_p": 0.9}}
    ways = {name: options for name, options in WAYS.items() if name in {tune.OFF, tune.STRICT, *arguments.rules}}
    found = tune.compare(trial, ways, prompts, arguments.max_tokens, arguments.rounds, BOUNDS, sampling)
    return {"metadata": results.metadata(**results.conditions(arguments), num_prompts=len(prompts)), **found}


def scorer(task: Task, tokenizer: Any) -> Callable[[list[int], list[int]], float] | None:
    """What scores an answer to a task from 0 to 1; None for a task without a right answer."""
    if task.reference is None:
        return None
    return lambda answer, plain: score(task, tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
