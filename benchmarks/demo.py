"""The demonstration: one model, the same questions, without speculation and with aasd, side by side.

    python -m benchmarks.demo --max-tokens 256

Starts one engine after the other, asks each the same questions one at a time (greedy), and prints tokens per second,
tokens per step, and the answers.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import textwrap
from pydoc_data.topics import topics
from typing import Any

from benchmarks import methods, results
from benchmarks.engine import Engine, EngineError
from benchmarks.tasks import Task, load_tokenizer, tokenize

_TEXT_LENGTH = 1800
# About Python's own documentation, which comes with Python.
QUESTIONS = tuple(
    Task(topic, "demo", f"{task}\n\n{topics[topic].strip()[:_TEXT_LENGTH]}")
    for task, topic in (
        ("Summarize this text in three sentences.", "exceptions"),
        ("Quote the two most important sentences of this text, word by word.", "naming"),
        ("Rewrite this text as a list, keeping its words.", "truth"),
        ("What does this text say about the order of evaluation? Quote it.", "booleans"),
        ("Explain this text to a beginner.", "for"),
        ("Continue this text.", "with"),
    )
)


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_model_argument(parser)
    parser.add_argument("--max-tokens", type=int, default=128, help="length of an answer (default %(default)s)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further arguments of vllm.LLM")
    arguments = parser.parse_args()
    results.require_model(arguments)
    tokenizer = load_tokenizer(arguments.model)
    prompts = tokenize(tokenizer, QUESTIONS, 1500)
    print(f"Model: {arguments.model}. {len(prompts)} questions, greedy, at most {arguments.max_tokens} tokens.")
    try:
        found = [ask(label, prompts, arguments) for label in ("none", "aasd")]
    except EngineError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    for answer in itertools.chain(*found):
        answer["text"] = tokenizer.decode(answer["token_ids"], skip_special_tokens=True)
    for question, plain, aasd in zip(QUESTIONS, *found, strict=True):
        print(f"\n{side_by_side(question.text.splitlines()[0], plain, aasd, shutil.get_terminal_size().columns)}")
    print(f"\n{summary(*found)}")


def ask(label: str, prompts: list[list[int]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start an engine, ask it everything, and stop it; see `Engine.run` for what an answer is."""
    print(f"{label}: starting the engine (about a minute)", flush=True)
    engine = {"model": arguments.model, "max_model_len": 2048, "max_num_seqs": 8, **arguments.engine}
    if methods.METHODS[label] is not None:
        engine |= {"speculative_config": methods.METHODS[label], "per_request_spec_decode_metrics": "summary"}
    sampling = {"temperature": 0.0, "max_tokens": arguments.max_tokens}
    with Engine(label, engine, threads=os.cpu_count() or 1) as started:
        # The first request pays for what is compiled or allocated on first use.
        started.run([{"prompt_token_ids": prompts[0][::-1], "sampling": sampling}])
        answers = []
        for number, prompt in enumerate(prompts, 1):
            print(f"{label}: question {number} of {len(prompts)}", flush=True)
            answers += started.run([{"prompt_token_ids": prompt, "sampling": sampling}])[0]
    return answers


def side_by_side(question: str, plain: dict[str, Any], aasd: dict[str, Any], width: int) -> str:
    """Two columns, without speculation and with aasd."""
    column = max(min(width, 200) // 2 - 2, 20)
    speeds = [len(one["token_ids"]) / one["last_token"] for one in (plain, aasd)]
    heads = f"without: {speeds[0]:.1f} tokens/s", f"aasd: {speeds[1]:.1f} tokens/s, {speeds[1] / speeds[0]:.2f}x"
    columns = [
        [head, "", *(line for part in one["text"].splitlines() for line in textwrap.wrap(part, column) or [""])]
        for head, one in zip(heads, (plain, aasd), strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(
        [f"--- {question} ".ljust(width, "-"), *(f"{left:{column}} | {right}".rstrip() for left, right in rows)]
    )


def summary(plain: list[dict[str, Any]], aasd: list[dict[str, Any]]) -> str:
    """All questions together."""
    speeds = [sum(len(one["token_ids"]) for one in of) / sum(one["last_token"] for one in of) for of in (plain, aasd)]
    drafted, accepted = (sum(one[key] for one in aasd) for key in ("drafted", "accepted"))
    # An answer's first token and step are its prefill's.
    tokens_per_step = sum(len(one["token_ids"]) - 1 for one in aasd) / max(sum(one["steps"] - 1 for one in aasd), 1)
    equal = sum(one["token_ids"] == other["token_ids"] for one, other in zip(plain, aasd, strict=True))
    lines = [
        f"{speeds[0]:.1f} tokens/s without, {speeds[1]:.1f} with aasd ({speeds[1] / speeds[0]:.2f}x), "
        f"{tokens_per_step:.2f} tokens per step, {accepted} of {drafted} draft tokens accepted.",
        f"{equal} of {len(plain)} answers are the same. By default aasd also accepts close rivals of the model's",
        'choice; with "aasd_verification": "strict" only near ties may fall differently.',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
