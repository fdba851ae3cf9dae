"""Speed: the same prompts through each method's real engine, in turn, round after round.

    python -m benchmarks.speed --data question.jsonl
    python -m benchmarks.speed --data question.jsonl --concurrency 8 --methods none ngram aasd

One engine per method, all alive at once, one at work at a time: round 1 of every method, then round 2, so that a
machine that grows slower slows them alike. Compiled as vLLM does it by default, bfloat16, greedy, prefix caching
off so that rounds repeat the same work. Ratios are paired by prompt (one request at a time) or by round.
Needs a quiet machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import results
from benchmarks.acceptance import METHODS
from benchmarks.data import GROUPS, chat_token_ids, choose, read_questions


def main() -> None:
    """Run the rounds, write the result, print its table."""
    parser = results.arguments(__doc__, out="speed.json")
    results.add_model_argument(parser)
    parser.add_argument("--data", help="questions, in the format of Spec-Bench's question.jsonl")
    parser.add_argument("--limit", type=int, default=4, help="questions per category (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="default 1 8")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["none", "ngram", "aasd"])
    parser.add_argument("--aasd", action="append", default=[], type=json.loads, metavar="JSON")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    results.require_model(arguments)
    if arguments.data is None:
        sys.exit("--data FILE is needed: questions in the format of Spec-Bench's question.jsonl, one a line")
    methods = {name: METHODS[name] for name in arguments.methods}
    for keys in arguments.aasd:
        methods["aasd " + " ".join(f"{k.removeprefix('aasd_')}={v}" for k, v in keys.items())] = {
            **METHODS["aasd"],
            **keys,
        }
    questions = choose(read_questions(arguments.data), GROUPS, arguments.limit)
    prompts = chat_token_ids(arguments.model, [question.text for question in questions], 3900)
    result = {
        "metadata": results.metadata(
            **{key: value for key, value in vars(arguments).items() if key not in ("out", "show")},
            num_questions=len(questions),
            sampling="greedy",
        ),
        "groups": [question.group for question in questions],
        "rounds": measure(methods, prompts, arguments),
    }
    results.write(arguments.out, result)
    print(tables(result))


def measure(methods: dict[str, Any], prompts: list[list[int]], arguments: argparse.Namespace) -> list[dict]:
    """Every method on every concurrency, in turn, for so many rounds."""
    engines = {name: _Engine(name, config, arguments) for name, config in methods.items()}
    try:
        rounds = []
        for number in range(-1, arguments.rounds):
            for concurrency in arguments.concurrency:
                for name, engine in engines.items():
                    # The round before the first warms up: code is compiled, and pages are touched.
                    chosen = prompts if number >= 0 else prompts[:2]
                    answers = engine.answer(chosen, concurrency, arguments.max_tokens)
                    if number >= 0:
                        rounds.append({"round": number, "method": name, "concurrency": concurrency, **answers})
                        print(f"round {number} x{concurrency} {name}: {answers['seconds']:.1f} s", file=sys.stderr)
        return rounds
    finally:
        for engine in engines.values():
            engine.close()


def tables(result: dict[str, Any]) -> str:
    """Per concurrency and method: tokens/s, time per output token, time to first token, and their ratios."""
    rounds = result["rounds"]
    first = rounds[0]["method"]
    rows = []
    for concurrency in dict.fromkeys(entry["concurrency"] for entry in rounds):
        chosen = [entry for entry in rounds if entry["concurrency"] == concurrency]
        base = {entry["round"]: entry for entry in chosen if entry["method"] == first}
        for method in dict.fromkeys(entry["method"] for entry in chosen):
            mine = [entry for entry in chosen if entry["method"] == method]
            speed = [entry["tokens"] / entry["seconds"] for entry in mine]
            end_to_end = [
                rate * base[e["round"]]["seconds"] / base[e["round"]]["tokens"]
                for rate, e in zip(speed, mine, strict=True)
            ]
            tpot, ttft = (_ratios(mine, base, key) for key in ("tpot", "ttft"))
            rows.append(
                [
                    str(concurrency),
                    method,
                    results.number(statistics.mean(speed), 1),
                    _spread(end_to_end),
                    _spread([1 / ratio for ratio in tpot]),
                    _spread(ttft),
                ]
            )
    header = [
        "requests at once",
        "method",
        "tokens/s",
        f"tokens/s over {first}",
        "speed per output token over " + first,
        "time to first token over " + first,
    ]
    return results.heading(result) + "\n\n" + results.table(header, rows)


def _ratios(mine: list[dict], base: dict[int, dict], key: str) -> list[float]:
    """Per round, the geometric mean over requests of this method's time over the first method's."""
    return [
        statistics.geometric_mean(
            [a / b for a, b in zip(entry[key], base[entry["round"]][key], strict=True)]
        )
        for entry in mine
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


class _Engine:
    """A method's engine in a process of its own, which answers when asked."""

    def __init__(self, name: str, speculative_config: dict[str, Any] | None, arguments: argparse.Namespace):
        engine = {"model": arguments.model, "max_model_len": 4096, "max_num_seqs": max(arguments.concurrency)}
        engine |= {"enable_prefix_caching": False, "speculative_config": speculative_config}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=results.ROOT,
        )
        print(f"{name}: starting", file=sys.stderr)
        self._ask(engine)

    def answer(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> dict[str, Any]:
        """Answer all prompts; see `benchmarks.speed_engine` for what comes back."""
        return self._ask({"prompts": prompts, "concurrency": concurrency, "max_tokens": max_tokens})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("an engine ended; its log stands above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    main()
