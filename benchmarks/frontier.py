"""The frontier of verification: what each policy gains in speed, and what it does to the answers.

    python -m benchmarks.frontier --data question.jsonl hotpotqa.jsonl
    python -m benchmarks.frontier --data question.jsonl --settings '{"aasd_verification": "typical", "aasd_floor": 0.1}'

What `vllm_aasd.tune` does for a user's own prompts, on published questions: one engine, every policy guarded and
unguarded, plain truncated sampling beside them, everything held against greedy decoding without speculation. A lossy
rule accepts tokens that the target would not have chosen, and much of what a loose one gains is the model copying its
prompt: agreement, copying and repetition show it, the likelihood of an answer doesn't. In float32 strict equals plain
decoding, so any difference is the rule's; in bfloat16 near ties fall either way, and the row `strict` tells how much of
a difference means nothing.
"""

import pathlib
import sys

from benchmarks import results
from vllm_aasd import tune
from vllm_aasd.tuning import candidates
from vllm_aasd.tuning.json_lines import DataError

UNGUARDED = {"aasd_collapse_guard": False}
"""What shows that the collapse guard prevents: the loose rules without it."""

SETTINGS = (*candidates.DEFAULTS, *(one | UNGUARDED for one in candidates.DEFAULTS[3:6]))

LEAST_EXACT = 1.0
"""Share of strict answers in float32 that must be plain decoding's, token by token, for any figure to count."""


def main() -> None:
    """Run every setting, write the result, print its table."""
    parser = results.arguments(__doc__, out="frontier.json")
    results.add_model_argument(parser)
    parser.add_argument(
        "--data", type=pathlib.Path, nargs="+", metavar="FILE", help="questions, see `vllm_aasd.tuning.tasks`"
    )
    parser.add_argument("--limit", default="8", help="questions of each category (default %(default)s)")
    parser.add_argument("--max-tokens", default="96", help="per answer (default %(default)s)")
    parser.add_argument("--rounds", default="2", help="how often each is timed (default %(default)s)")
    parser.add_argument("--concurrency", default="8", help="requests at once (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="float32")
    parser.add_argument("--max-model-len", default="4096", help="default %(default)s")
    parser.add_argument("--settings", nargs="+", type=candidates.parsed, default=SETTINGS, metavar="JSON")
    parser.add_argument(
        "--drafting", type=candidates.parsed, default={}, metavar="JSON", help="further keys, for all rows"
    )
    parser.epilog = "All other arguments are those of vLLM's engine, such as --gpu-memory-utilization 0.5."
    arguments, of_vllm = parser.parse_known_args()
    if arguments.show:
        print(tune.summary(results.read(arguments.show)))
        return
    results.require_model(arguments)
    if arguments.data is None:
        parser.error("--data FILE is needed: questions, one JSON object a line")
    tuned = tune.argument_parser().parse_args(
        ["--model", arguments.model, "--prompts", *map(str, arguments.data)]
        + [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("limit", "max_tokens", "rounds")]
    )
    tuned.settings, tuned.drafting = arguments.settings, arguments.drafting
    engine = ["--dtype", arguments.dtype, "--max-model-len", arguments.max_model_len]
    engine += ["--max-num-seqs", arguments.concurrency, *of_vllm]
    try:
        found = tune.compare(tuned, engine)
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    result = {"metadata": results.metadata(**results.conditions(arguments)), **found}
    exact = found["runs"][candidates.STRICT]["equal"]["value"]
    results.write(arguments.out, result)
    if arguments.dtype == "float32" and exact < LEAST_EXACT:
        sys.exit(f"strict isn't exact, no figures: {100 * exact:.1f} % of its answers are plain decoding's")
    print("\n".join((results.heading(result), "", tune.summary(result))))


if __name__ == "__main__":
    main()
