"""One end-to-end comparison: engines started, warmed up, measured in turn, checked, and written down."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import comparison, methods, results, resume, rounds
from benchmarks.builtin import builtin_tasks
from benchmarks.engine import Engine, progress_line
from benchmarks.exactness import common_prefix, failed, first_difference, gaps, verdict
from benchmarks.methods import NEAR_TIE
from vllm_aasd.tuning.json_lines import DataError
from vllm_aasd.tuning.prompts import load_tokenizer, tokenise
from vllm_aasd.tuning.scores import score
from vllm_aasd.tuning.tasks import Task, by_category, read_tasks

Prompts = Mapping[str, list[list[int]]]
"""Token ids, by category."""

SLACK = 64
"""Tokens that the engines hold beyond the longest prompt and answer, so that no draft is cut short."""


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every method over everything; write the result, and return it."""
    results.require_model(arguments)
    chosen = methods.chosen(arguments.methods, arguments.aasd)
    methods.require(list(chosen))
    limits = dict(zip(arguments.concurrency, _per_concurrency(arguments), strict=True))
    tasks = by_category(read_all(arguments), max(limits.values()), arguments.categories)
    sizes = {
        concurrency: {category: min(limit, len(members)) for category, members in tasks.items()}
        for concurrency, limit in limits.items()
    }
    tokenizer = load_tokenizer(arguments.model)
    prompts = {
        category: tokenise(tokenizer, members, arguments.max_prompt_tokens) for category, members in tasks.items()
    }
    sampling = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    requests = {
        category: [{"prompt_token_ids": prompt, "sampling": sampling} for prompt in members]
        for category, members in prompts.items()
    }
    metadata = results.metadata(
        **results.conditions(arguments, "draw", "against", "resume", "quick"),
        near_tie_nats=NEAR_TIE[arguments.dtype],
        has_prior=methods.has_prior(arguments.model, chosen),
        num_prompts={str(concurrency): by for concurrency, by in sizes.items()},
    )
    settings = [metadata["commit"], metadata["versions"], metadata["conditions"], chosen, prompts]
    store = resume.Store(arguments.out.with_suffix(".unfinished"), settings)
    kept = store.load() if arguments.resume else {}
    found = {place: rounds.Measurement(*measured) for place, measured in kept.items()}
    with contextlib.ExitStack() as stack:
        engines = {}
        for label, speculative_config in chosen.items():
            progress_line(f"{label}: starting the engine ({len(engines) + 1} of {len(chosen)})")
            began = time.monotonic()
            engines[label] = stack.enter_context(start(label, speculative_config, arguments))
            progress_line("")
            print(f"{label}: started in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        warm_up(engines, requests, arguments)
        total = arguments.rounds * sum(sum(by.values()) for by in sizes.values())
        progress = rounds.Progress(total)
        rounds.measure(engines, requests, sizes, arguments.rounds, found, progress, store.save)
        checked = check(engines, chosen, prompts, found, arguments)
        # How many threads and which cores there really were.
        metadata["conditions"] |= next(iter(engines.values())).ready
    result = {
        "metadata": metadata,
        "methods": chosen,
        "exactness": checked,
        "columns": [*rounds.COLUMNS, "common_prefix", "score"],
        "runs": list(run_entries(found, next(iter(chosen)), tasks, prompts, tokenizer)),
    }
    # No speed of wrong answers, not even in the file.
    if not failed(checked):
        result["figures"] = rounded(comparison.figures(result))
    results.write(arguments.out, result)
    store.remove()
    return result


def rounded(value: Any) -> Any:
    """Figures with no more digits than they have meaning."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def read_all(arguments: argparse.Namespace) -> list[Task]:
    """The tasks of all sources.

    Raises:
        DataError: if there is none.
    """
    tasks = [task for path in arguments.data for task in read_tasks(path)]
    if arguments.builtin:
        tasks += builtin_tasks()
    if not tasks:
        raise DataError("there is nothing to ask: name a file with --data, or take --builtin")
    return tasks


def start(label: str, speculative_config: dict[str, Any] | None, arguments: argparse.Namespace) -> Engine:
    """The engine of a method, not started yet."""
    engine = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_prompt_tokens + arguments.max_tokens + SLACK,
        "max_num_seqs": max(*arguments.concurrency, 8),
        "enable_prefix_caching": arguments.prefix_caching,
        "enforce_eager": arguments.eager,
        "distributed_executor_backend": "uni",
    }
    if speculative_config is not None:
        engine |= {"speculative_config": speculative_config, "per_request_spec_decode_metrics": "detailed"}
    stock = speculative_config is not None and speculative_config["method"] != "aasd"
    return Engine(label, engine, arguments.core, arguments.threads, stock and arguments.temperature > 0)


def warm_up(engines: Mapping[str, Engine], requests: Mapping[str, list], arguments: argparse.Namespace) -> None:
    """Let each engine pay for what is compiled or allocated on first use, with any number of requests up to the most."""
    longest = max((request for members in requests.values() for request in members), key=_length)
    # Reversed, so that nobody learns an answer.
    words = longest["prompt_token_ids"][::-1]
    most = max(arguments.concurrency)
    sampling = longest["sampling"] | {"max_tokens": max(most, 16), "ignore_eos": True}
    lengths = [len(words), *[len(words) // 4 + 1] * (most - 1)]
    # They end one by one.
    wanted = rounds.staggered([{"prompt_token_ids": words[:n], "sampling": sampling} for n in lengths], most)
    for label, engine in engines.items():
        progress_line(f"{label}: warming up")
        engine.run(wanted, most)


def check(
    engines: Mapping[str, Engine],
    chosen: Mapping[str, dict[str, Any] | None],
    prompts: Prompts,
    found: Mapping[rounds.Place, rounds.Measurement],
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any] | None]:
    """The verdict on each method that promises greedy answers; None for the others."""
    first = next(iter(chosen))
    # Plain decoding judges, where it runs.
    judge = engines.get("none", engines[first])
    verdicts: dict[str, dict[str, Any] | None] = {}
    for label, speculative_config in chosen.items():
        verdicts[label] = None
        if label == first or arguments.temperature > 0 or not methods.is_exact(speculative_config):
            continue
        differences = [
            first_difference(prompts[place[1]][int(row[0])], one, other)
            for place, ours in found.items()
            if place[0] == label
            for row, one, other in zip(ours.rows, found[first, *place[1:]].token_ids, ours.token_ids, strict=True)
        ]
        parted = [one for one in differences if one is not None]
        verdicts[label] = verdict(differences, gaps(judge, parted), NEAR_TIE[arguments.dtype])
    return verdicts


def run_entries(
    found: Mapping[rounds.Place, rounds.Measurement],
    first: str,
    tasks: Mapping[str, list[Task]],
    prompts: Prompts,
    tokenizer: Any,
) -> Iterator[dict[str, Any]]:
    """The measurements as the result holds them: with agreement and scores, without tokens."""
    for (label, category, concurrency, number), measured in found.items():
        plain = found[first, category, concurrency, number].token_ids
        rows = []
        for row, ours, theirs in zip(measured.rows, measured.token_ids, plain, strict=True):
            task, prompt = tasks[category][int(row[0])], prompts[category][int(row[0])]
            share = common_prefix(ours, theirs) / max(len(ours), len(theirs), 1)
            scored = score(task.score, tokenizer, prompt=prompt, token_ids=ours, first=theirs, reference=task.reference)
            rows.append([*row, round(share, 4), scored])
        yield {
            "method": label,
            "category": category,
            "concurrency": concurrency,
            "round": number,
            "seconds": round(measured.seconds, 4),
            "drafted_at": measured.drafted_at,
            "accepted_at": measured.accepted_at,
            "rows": rows,
        }


def _per_concurrency(arguments: argparse.Namespace) -> list[int]:
    limits = arguments.limit
    if len(limits) not in (1, len(arguments.concurrency)):
        raise ValueError(f"--limit takes one number, or one per concurrency, and has {len(limits)}")
    return limits * len(arguments.concurrency) if len(limits) == 1 else limits


def _length(request: dict[str, Any]) -> int:
    return len(request["prompt_token_ids"])
