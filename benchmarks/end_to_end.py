"""End to end: how fast the real engine answers real prompts, by method, category and concurrency.

    python -m benchmarks.end_to_end --quick
    python -m benchmarks.end_to_end --data question.jsonl hotpotqa.jsonl --builtin --core 0 --limit 8 16 32 \\
        --methods none ngram suffix --aasd '{"aasd_verification": "strict"}' --concurrency 1 8 32

One engine process per method lives through the whole run, and the methods take turns over the same prompts,
in rounds; the others sleep meanwhile. With one request at a time the turns change with every request, else
with every category, all of whose prompts are sent, so many in flight, and the first of them get fewer tokens so
that answers don't keep step (`benchmarks.rounds.staggered`). Before every round and concurrency the
engines forget what they learnt from earlier answers, for the same prompts come again. Speed needs a quiet
core.

Correctness comes first: greedy answers of a method that promises them are compared with the first method's,
and where they part beyond a near tie (see `benchmarks.exactness`) no figure is printed, and the exit code is
1.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import methods, results
from benchmarks.end_to_end_report import report
from benchmarks.end_to_end_run import compare
from benchmarks.engine import EngineError
from benchmarks.exactness import failed
from benchmarks.methods import METHODS, NEAR_TIE
from vllm_aasd.tuning.json_lines import DataError

QUICK = {
    "builtin": True,
    "concurrency": [1, 2],
    "limit": [1, 2],
    "rounds": 1,
    "max_tokens": 32,
    "max_prompt_tokens": 128,
    "eager": True,
}
"""What ``--quick`` stands for: too little for figures, enough to see that everything works."""


def main() -> None:
    """Run the comparison, write the result, print its tables."""
    arguments = _arguments()
    if arguments.draw:
        result = results.read(arguments.draw)
        if arguments.against not in (None, *result["methods"]):
            sys.exit(f"error: --against takes one of {', '.join(map(repr, result['methods']))}")
        print(report(result, arguments.against))
        return
    try:
        result = compare(arguments)
    except (DataError, EngineError, OSError, ValueError, methods.MissingPackage) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was measured is kept for --resume")
    print(report(result))
    if failed(result["exactness"]):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    results.add_model_argument(parser)
    add(
        "--data",
        type=pathlib.Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines: Spec-Bench, HotpotQA, or `prompt`",
    )
    add("--builtin", action="store_true", help="also the tasks that ship with Python")
    add("--categories", nargs="+", help="only these (default: all that there are)")
    add(
        "--methods",
        nargs="+",
        action=_Listed,
        type=_listed(_method),
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; the first is the one compared with (default: all)",
    )
    add(
        "--aasd",
        action="append",
        default=[],
        type=methods.settings,
        metavar="JSON",
        help="also aasd with these settings",
    )
    add(
        "--concurrency",
        nargs="+",
        action=_Listed,
        type=_listed(_positive),
        metavar="N",
        default=[1, 8, 32],
        help="requests at once (default 1 8 32)",
    )
    add(
        "--limit",
        nargs="+",
        action=_Listed,
        type=_listed(_positive),
        metavar="N",
        default=[8],
        help="prompts per category, for each concurrency (default 8)",
    )
    add("--rounds", type=_positive, default=3, help="default %(default)s")
    add("--max-tokens", type=_positive, default=96, help="per answer (default %(default)s)")
    add(
        "--max-prompt-tokens",
        type=_positive,
        default=1500,
        help="longer prompts lose their middle (default %(default)s)",
    )
    add("--temperature", type=float, default=0.0, help="default %(default)s, greedy")
    add("--dtype", choices=tuple(NEAR_TIE), default="bfloat16", help="default %(default)s")
    add("--core", type=int, help="the only CPU core that the engines may use")
    add("--threads", type=_positive, default=1, help="of OpenMP, in each engine (default %(default)s)")
    add("--prefix-caching", action="store_true", help="keep prefixes within a round")
    add("--eager", action="store_true", help="don't compile; for a quick look, not for figures")
    add("--quick", action="store_true", help="a few minutes, to see that it works; for no figures")
    add("--out", "--json", type=pathlib.Path, default=results.RESULTS / "end_to_end.json", help="result file")
    add("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    add("--draw", type=pathlib.Path, metavar="FILE", help="only print the tables of a result file")
    add("--against", metavar="METHOD", help="with --draw: ratios to this method instead of the first")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


class _Listed(argparse.Action):
    """Of an option whose values stand apart by spaces or by commas."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [value for listed in values for value in listed])


def _listed(of_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [of_one(one) for one in text.split(",")]


def _method(text: str) -> str:
    if text not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it takes {', '.join(METHODS)}")
    return text


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it takes an integer of at least 1")
    return value


if __name__ == "__main__":
    main()
