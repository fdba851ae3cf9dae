"""Recorded answers that several programs replay: recorded once for the same prompts, model and length.

They are kept in ``.bench/`` of the clone, which isn't committed.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks import replay, results
from benchmarks.end_to_end_run import read_all
from benchmarks.engine import Engine
from benchmarks.methods import NEAR_TIE
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.tuning.prompts import load_tokenizer, tokenise
from vllm_aasd.tuning.tasks import Task, by_category

FOLDER = results.ROOT / ".bench"

# Answers are those of plain vLLM: nothing of ours changes them.
_ANSWERING = ("vllm", "torch", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `measured_tasks` and `recorded` read."""
    results.add_model_argument(parser)
    parser.add_argument("--data", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help="to measure on")
    parser.add_argument("--builtin", action="store_true", help="also the tasks that ship with Python")
    parser.add_argument("--limit", type=int, default=16, help="prompts per category (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per answer (default %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1500, help="default %(default)s")
    parser.add_argument("--dtype", choices=tuple(NEAR_TIE), default="bfloat16", help="default %(default)s")


def measured_tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that are measured on: the same choice as in `benchmarks.end_to_end`."""
    members = by_category(read_all(arguments), arguments.limit, None).values()
    return [task for tasks in members for task in tasks]


def recorded(tasks: Sequence[Task], arguments: argparse.Namespace) -> list[replay.Trace]:
    """The model's greedy answers, with its predictions; recorded now unless they were before.

    Args:
        tasks: to be answered.
        arguments: those of `add_arguments`.
    """
    prompts = tokenise(load_tokenizer(arguments.model), tasks, arguments.max_prompt_tokens)
    versions = {name: version for name, version in results.versions().items() if name in _ANSWERING}
    settings = [prompts, model_key(arguments.model), arguments.max_tokens, arguments.dtype, versions]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = FOLDER / f"traces-{key}.npz"
    if not path.exists():
        print(f"recording {len(tasks)} answers", file=sys.stderr, flush=True)
        save(path, _record([task.category for task in tasks], prompts, arguments))
    return load(path)


def save(path: pathlib.Path, traces: Sequence[replay.Trace]) -> None:
    """Write traces; an earlier file is replaced only when this one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(
            file,
            categories=np.array([trace.category for trace in traces]),
            prompt_lengths=np.array([trace.num_prompt_tokens for trace in traces]),
            lengths=np.array([len(trace.token_ids) for trace in traces]),
            token_ids=np.concatenate([trace.token_ids for trace in traces]),
            tables=np.concatenate([trace.table for trace in traces]),
        )
    partial.replace(path)


def load(path: pathlib.Path) -> list[replay.Trace]:
    """Read what `save` wrote."""
    with np.load(path) as held:
        ends = np.cumsum(held["lengths"])[:-1]
        parts = zip(
            held["categories"].tolist(),
            np.split(held["token_ids"], ends),
            held["prompt_lengths"].tolist(),
            np.split(held["tables"], ends),
            strict=True,
        )
        return [replay.Trace(*part) for part in parts]


def _record(categories: Sequence[str], prompts: list[list[int]], arguments: argparse.Namespace) -> list[replay.Trace]:
    engine = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_prompt_tokens + arguments.max_tokens,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    with Engine("none", engine, threads=1) as plain:
        return replay.record(plain, categories, prompts, arguments.max_tokens)
