"""Prefill overhead: how much later the first token comes with a method than without speculation, by prompt length.

    python -m benchmarks.prefill --core 0

One request at a time, so that the time to the first token is the prompt's own: the forward pass, the method's work on
the prompt (aasd: its index, and the predictions at prompt positions where they are stored) and the first draft. All
engines are up at once and take turns on the same prompts, text that ships with Python. The first tokens must be those
of the first method, which no draft has touched yet, or no figure is printed.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from benchmarks import methods, results
from benchmarks.engine import Engine, EngineError, progress_line
from vllm_aasd.tuning import statistics

METHODS = ("none", "ngram", "aasd")
ALWAYS = {"aasd_alignment": True}
"""The variant that stores predictions at every prompt position, whatever that takes."""

# One token behind the first, so that the step of the prompt also drafts.
_SAMPLING = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}


def main() -> None:
    """Measure, write the result, print its table."""
    arguments = _arguments()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    results.require_model(arguments)
    chosen = methods.chosen(arguments.methods, [ALWAYS])
    try:
        result = {
            "metadata": results.metadata(**results.conditions(arguments)),
            "methods": chosen,
            **run(arguments, chosen),
        }
    except (EngineError, ValueError) as error:
        sys.exit(f"error: {error}")
    results.write(arguments.out, result)
    print(tables(result))


def run(arguments: argparse.Namespace, chosen: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Start the engines and measure every length.

    Returns:
        ``{"seconds": {length: {label: [prompts][rounds]}}, "figures": {length: {label: ...}}}``

    Raises:
        ValueError: if a method's first token isn't that of the first method.
    """
    prompts = prompts_of(arguments.model, arguments.lengths, arguments.prompts)
    with contextlib.ExitStack() as stack:
        engines = {}
        for label, config in chosen.items():
            progress_line(f"{label}: starting the engine ({len(engines) + 1} of {len(chosen)})")
            engines[label] = stack.enter_context(_engine(label, config, arguments))
        for engine in engines.values():
            # Reversed, so that nobody has seen a prompt; pays for what is compiled or allocated on first use.
            engine.run([{"prompt_token_ids": prompts[max(prompts)][0][::-1], "sampling": _SAMPLING}] * 2, 1)
        seconds = measure(engines, prompts, arguments.rounds)
    first = next(iter(chosen))
    return {
        "seconds": seconds,
        "figures": {length: figures(by_label, first) for length, by_label in seconds.items()},
    }


def prompts_of(model: str, lengths: Sequence[int], number: int) -> dict[int, list[list[int]]]:
    """Prompts of exactly so many tokens each, of text that none of the others holds.

    Raises:
        ValueError: if there isn't so much text.
    """
    from transformers import AutoTokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = AutoTokenizer.from_pretrained(model).encode(text)
    wanted = number * sum(lengths)
    if wanted > len(token_ids):
        raise ValueError(f"{number} prompts of each length take {wanted} tokens, and there are {len(token_ids)}")
    left = iter(token_ids)
    return {length: [list(itertools.islice(left, length)) for _ in range(number)] for length in lengths}


def measure(
    engines: Mapping[str, Engine], prompts: Mapping[int, Sequence[list[int]]], num_rounds: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds to the first token, by length, method, prompt and round.

    Raises:
        ValueError: see `run`.
    """
    seconds = {str(length): {label: [[] for _ in members] for label in engines} for length, members in prompts.items()}
    labels = list(engines)
    began, total, done = time.monotonic(), num_rounds * sum(map(len, prompts.values())), 0
    for _ in range(num_rounds):
        for engine in engines.values():
            engine.forget()
        for length, members in prompts.items():
            for index, token_ids in enumerate(members):
                first_tokens = {}
                for label in [*labels[done % len(labels) :], *labels[: done % len(labels)]]:
                    request = {"prompt_token_ids": token_ids, "sampling": _SAMPLING}
                    (answer,), _ = engines[label].run([request], 1)
                    seconds[str(length)][label][index].append(answer["first_token"] - answer["sent"])
                    first_tokens[label] = answer["token_ids"][0]
                wrong = [label for label in labels if first_tokens[label] != first_tokens[labels[0]]]
                if wrong:
                    raise ValueError(
                        f"{wrong[0]}: another first token than {labels[0]}'s, on prompt {index} of {length} tokens"
                    )
                done += 1
                left = (time.monotonic() - began) / done * (total - done)
                progress_line(f"{done} of {total} prompts, about {left / 60:.0f} min left")
    progress_line("")
    return seconds


def figures(by_label: Mapping[str, Sequence[Sequence[float]]], first: str) -> dict[str, dict[str, Any]]:
    """Of one length: the median in milliseconds, and the overhead in percent with an interval.

    The overhead is the method's sum over the first method's, each prompt and round paired; the interval is a bootstrap over
    both. Each prompt counts with the faster half of its rounds: what else ran on the machine only ever adds.
    """
    rng = np.random.default_rng(0)
    times = {label: _faster_half(np.asarray(of)) for label, of in by_label.items()}
    size, num_rounds = times[first].shape
    prompt_draws, round_draws = statistics.draws(size, rng), statistics.draws(num_rounds, rng)
    found = {}
    for label, of in times.items():
        ratio = statistics.with_interval(statistics.crossed_ratio(of, times[first], prompt_draws, round_draws))
        overhead = {key: None if value is None else round(100 * (value - 1), 2) for key, value in ratio.items()}
        found[label] = {"median_ms": round(1000 * float(np.median(of)), 2), "overhead_percent": overhead}
    return found


def tables(result: Mapping[str, Any]) -> str:
    """The result as text."""
    rows = []
    for length, of in result["figures"].items():
        for label, figure in of.items():
            overhead = results.interval(figure["overhead_percent"], 1)
            rows.append([length, label, f"{figure['median_ms']:.1f}", overhead])
    header = ["prompt tokens", "method", "ms to the first token", "overhead, %"]
    return "\n".join((results.heading(result), "", results.table(header, rows)))


def _faster_half(times: np.ndarray) -> np.ndarray:
    """``[prompts, ceil(rounds / 2)]``, in rising order."""
    return np.sort(times, axis=1)[:, : (times.shape[1] + 1) // 2]


def _engine(label: str, config: dict[str, Any] | None, arguments: argparse.Namespace) -> Engine:
    longest = max(arguments.lengths)
    engine = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "max_model_len": longest + 64,
        # A prompt is one step, so that it has one time.
        "max_num_batched_tokens": max(longest, 2048),
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    if config is not None:
        engine |= {"speculative_config": config, "per_request_spec_decode_metrics": "detailed"}
    return Engine(label, engine, arguments.core, arguments.threads)


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, out="prefill.json")
    results.add_model_argument(parser)
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(methods.METHODS), default=list(METHODS), help="the first is compared with")
    add("--lengths", type=int, nargs="+", default=[250, 1000, 3000], help="prompt tokens (default %(default)s)")
    add("--prompts", type=int, default=12, help="of each length (default %(default)s)")
    add("--rounds", type=int, default=4, help="over all of them (default %(default)s)")
    add("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="default %(default)s")
    add("--core", type=int, help="the only CPU core of all engines (default: any)")
    add("--threads", type=int, default=1, help="of OpenMP (default %(default)s)")
    arguments = parser.parse_args()
    for name in ("lengths", "prompts", "rounds", "threads"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} takes integers of at least 1, and has {value}")
    return arguments


if __name__ == "__main__":
    main()
