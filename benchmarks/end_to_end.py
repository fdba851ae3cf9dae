"""End to end: how fast the real engine answers real prompts, by method, category and concurrency.

    python -m benchmarks.end_to_end --builtin --data question.jsonl --methods none ngram suffix \\
        --aasd '{"aasd_verification": "strict"}' --concurrency 1 8 32 --rounds 3

One engine process per method lives through the whole run, and the methods take turns over the same prompts, in
rounds; the others sleep meanwhile. At concurrency 1 the turns change with every prompt, else with every category, all
of whose prompts are sent, that many in flight. Before every round and concurrency the engines forget earlier answers;
``--passes 2`` then asks the same prompts again, to see what a method gains from answers that it has seen. Speed needs
a quiet core.

Correctness comes first: greedy answers of a method that promises them are compared with the first method's, and where
they differ beyond a near tie (see `benchmarks.exactness`) no figure is written, and the exit code is 1.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import comparison, exactness, methods, report, results
from benchmarks.builtin import agent, builtin_tasks
from benchmarks.engine import Engine, EngineError
from benchmarks.rounds import Found, Place, measure, staggered
from benchmarks.tasks import Task, by_category, halves, load_tokenizer, read_tasks, tokenize

SLACK = 64
"""Tokens beyond the longest prompt and answer, so that no draft is cut short."""


def main() -> None:
    """Run the comparison, write the result, print its tables."""
    arguments = _arguments()
    results.require_model(arguments)
    try:
        # Rounded as in the file, so that what is printed can be printed again.
        result = results.rounded(compare(arguments))
    except (EngineError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was measured is kept for --resume")
    inexact = exactness.failed(result["exactness"])
    if inexact:
        sys.exit(f"no figures, nothing written: {', '.join(inexact)} isn't exact: {result['exactness']}")
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{report.speed_by_category(result)}")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every method over everything, and judge the answers."""
    chosen = methods.chosen(arguments.methods, arguments.aasd)
    num_loads = len(arguments.concurrency)
    per_load = arguments.limit * num_loads if len(arguments.limit) == 1 else arguments.limit
    limits = dict(zip(arguments.concurrency, per_load, strict=True))
    tasks = by_category(read_all(arguments), max(limits.values()), arguments.categories)
    if arguments.halves:
        tasks = halves(tasks)
        limits = dict.fromkeys(limits, max(map(len, tasks.values())))
    tasks = {category: [task for task in of for _ in range(arguments.samples)] for category, of in tasks.items()}
    limits = {concurrency: limit * arguments.samples for concurrency, limit in limits.items()}
    sizes = {c: {category: min(limit, len(of)) for category, of in tasks.items()} for c, limit in limits.items()}
    tokenizer = load_tokenizer(arguments.model)
    prompts = {category: tokenize(tokenizer, of, arguments.max_prompt_tokens) for category, of in tasks.items()}
    sampling = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    requests = {
        category: [{"prompt_token_ids": prompt, "sampling": sampling} for prompt in of]
        for category, of in prompts.items()
    }
    metadata = results.metadata(
        **results.conditions(arguments, "resume"),
        has_prior=methods.has_prior(arguments.model, chosen),
        num_prompts={str(concurrency): by for concurrency, by in sizes.items()},
    )
    unfinished = arguments.out.with_suffix(".unfinished")
    settings = [metadata["commit"], metadata["versions"], metadata["conditions"], chosen, prompts]
    key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
    found: Found = {}
    if arguments.resume and unfinished.exists():
        saved = json.loads(unfinished.read_text())
        if saved["key"] != key:
            raise ValueError(f"{unfinished} is of a run with other settings; run without --resume")
        found = {Place(*place): entry for place, entry in saved["found"]}

    def save(found: Found) -> None:
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps({"key": key, "found": list(found.items())}))
        partial.replace(unfinished)

    with contextlib.ExitStack() as stack:
        engines = {}
        for label, config in chosen.items():
            began = time.monotonic()
            engines[label] = stack.enter_context(start(label, config, arguments))
            print(f"{label}: started in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        warm_up(engines, requests, max(arguments.concurrency))
        measure(engines, requests, sizes, arguments.rounds, arguments.passes, found, save)
        checked = {} if arguments.temperature > 0 else check(engines, chosen, prompts, found, arguments.dtype)
    unfinished.unlink(missing_ok=True)
    figures = comparison.figures(found, list(chosen))
    return {"metadata": metadata, "methods": chosen, "exactness": checked, "figures": figures}


def read_all(arguments: argparse.Namespace) -> list[Task]:
    """The tasks of all sources.

    Raises:
        ValueError: if there is none.
    """
    tasks = [task for path in arguments.data for task in read_tasks(path)]
    tasks += builtin_tasks() if arguments.builtin else []
    tasks += agent() if "agent" in (arguments.categories or ()) else []
    if not tasks:
        raise ValueError("there is nothing to ask: name a file with --data, or add --builtin")
    return tasks


def start(label: str, config: methods.Config, arguments: argparse.Namespace) -> Engine:
    """The engine of a method, not started yet."""
    engine: dict[str, Any] = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_prompt_tokens + arguments.max_tokens + SLACK,
        "max_num_seqs": max(*arguments.concurrency, 8),
        "enable_prefix_caching": arguments.prefix_caching,
        "enforce_eager": arguments.eager,
        "distributed_executor_backend": "uni",
    }
    if config is not None:
        engine |= {"speculative_config": config, "per_request_spec_decode_metrics": "summary"}
    is_stock = config is not None and config["method"] != "aasd"
    return Engine(label, engine, arguments.core, arguments.threads, is_stock and arguments.temperature > 0)


def warm_up(engines: Mapping[str, Engine], requests: Mapping[str, list[dict[str, Any]]], most: int) -> None:
    """Let each engine pay for what is compiled or allocated on first use, with any number of requests up to `most`."""
    longest = max((one for of in requests.values() for one in of), key=lambda one: len(one["prompt_token_ids"]))
    # Reversed, so that no engine learns an answer.
    words = longest["prompt_token_ids"][::-1]
    sampling = longest["sampling"] | {"max_tokens": max(most, 16), "ignore_eos": True}
    lengths = [len(words), *[len(words) // 4 + 1] * (most - 1)]
    # They end one by one.
    wanted = staggered([{"prompt_token_ids": words[:n], "sampling": sampling} for n in lengths], most)
    for engine in engines.values():
        engine.run(wanted, most)


def check(
    engines: Mapping[str, Engine],
    chosen: Mapping[str, methods.Config],
    prompts: Mapping[str, list[list[int]]],
    found: Found,
    dtype: str,
) -> dict[str, dict[str, Any] | None]:
    """The verdict on each method that promises the greedy answers of the first; None for the others."""
    first, *others = chosen
    # Plain decoding judges, where it runs.
    judge = engines.get("none", engines[first])
    verdicts: dict[str, dict[str, Any] | None] = {}
    for label in others:
        if not methods.is_exact(chosen[label]):
            verdicts[label] = None
            continue
        places = [place for place in found if place.method == label]
        rows = {
            of: [row for place in places for row in found[place._replace(method=of)]["rows"]] for of in (first, label)
        }
        asked = [prompts[place.category][row["prompt"]] for place in places for row in found[place]["rows"]]
        verdicts |= exactness.verdicts(judge, asked, rows, methods.NEAR_TIE[dtype])
    return verdicts


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, "end_to_end.json")
    add = parser.add_argument
    results.add_model_argument(parser)
    add("--data", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="JSON lines, see benchmarks.tasks")
    add("--builtin", action="store_true", help="also the tasks that ship with Python")
    add("--categories", nargs="+", help="only these (default: all)")
    add(
        "--methods",
        nargs="+",
        choices=methods.METHODS,
        default=list(methods.METHODS),
        help="the first is compared with",
    )
    add("--aasd", nargs="+", default=[], type=json.loads, metavar="JSON", help="also aasd with these settings")
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32], help="requests at once (default 1 8 32)")
    add(
        "--limit",
        nargs="+",
        type=int,
        default=[8],
        help="prompts per category, one or per concurrency (default 8)",
    )
    add("--rounds", type=int, default=3, help="default %(default)s")
    add("--passes", type=int, default=1, help="how often prompts come in a round (default %(default)s)")
    add("--samples", type=int, default=1, help="requests per prompt, one after the other, as with `n`")
    add("--halves", action="store_true", help="mix all prompts, and compare the first half with the last")
    add("--max-tokens", type=int, default=96, help="per answer (default %(default)s)")
    add("--max-prompt-tokens", type=int, default=1500, help="longer prompts lose their middle (default 1500)")
    add("--temperature", type=float, default=0.0, help="default %(default)s, greedy")
    add("--dtype", choices=methods.NEAR_TIE, default="bfloat16", help="default %(default)s")
    add("--core", type=int, help="the only CPU core that the engines may use")
    add("--threads", type=int, default=1, help="of OpenMP, in each engine (default %(default)s)")
    add("--prefix-caching", action="store_true", help="keep prefixes within a round")
    add("--eager", action="store_true", help="don't compile; for a quick look, not for figures")
    add("--resume", action="store_true", help="continue an interrupted run of the same settings")
    return parser.parse_args()


if __name__ == "__main__":
    main()
