"""Drafter time: microseconds that drafting takes per request and step, by the length of the context.

    python -m benchmarks.drafter_time --data question.jsonl

The context is real text, grown by a few tokens before every draft as decoding does. Measured: the drafter
with the alignment store and without, and vLLM's n-gram proposer on the same contexts; the time to take in a
fresh prompt, and the memory of its index. The entries of the store are made up (each position's true
successor with a probability around one half, and three random tokens), for the time doesn't depend on where
they come from. Before anything is timed, the drafter's proposals are compared with those of its plain twin.
"""

import argparse
import importlib
import inspect
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import data, results
from benchmarks.ngram import proposer
from benchmarks.timing import microseconds
from vllm_aasd.config import NUM_SPECULATIVE_TOKENS_V1, Settings
from vllm_aasd.drafting.drafter import (
    DEFAULT_WEIGHTS,
    MAX_MATCHES,
    NO_ALIGNMENT,
    NUM_ORDERS,
    AlignmentView,
    Drafter,
)
from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels.draft import no_prior
from vllm_aasd.kernels.draft import reference as draft_reference

BLOCK_SIZE = 128
"""Slots of a KV block, as vLLM's CPU platform has it."""

NEW_TOKENS = 2
"""By which the context grows from draft to draft, about what a step emits."""

NUM_DRAFT_TOKENS = NUM_SPECULATIVE_TOKENS_V1
MIN_SURVIVAL = Settings().min_survival
TOP_K = 4

_SOURCES = (
    "argparse",
    "ast",
    "collections",
    "difflib",
    "inspect",
    "pathlib",
    "subprocess",
    "tarfile",
    "typing",
)


def main() -> None:
    """Measure, write the result, print its table."""
    parser = results.arguments(__doc__, out="drafter_time.json")
    results.add_model_argument(parser)
    parser.add_argument("--data", type=pathlib.Path, help="questions to make contexts of; Python's sources by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="drafts per context (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    results.require_model(arguments)
    needed = max(arguments.lengths) + NEW_TOKENS * arguments.steps
    tokens, vocab_size, source = real_tokens(arguments, needed)
    view = made_up_alignment(tokens, vocab_size)
    check_against_twin(tokens[:1024], view, vocab_size)
    rows = []
    for length in arguments.lengths:
        index_build, index_bytes = time_index(tokens, length)
        rows.append(
            {
                "context_tokens": length,
                "aligned": time_drafter(tokens, length, arguments.steps, view, vocab_size),
                "without_alignment": time_drafter(tokens, length, arguments.steps, NO_ALIGNMENT, vocab_size),
                "vllm_ngram": time_ngram(tokens, length, arguments.steps),
                "index_build": index_build,
                "index_bytes": index_bytes,
            }
        )
    result = {
        "metadata": metadata(model=arguments.model, text=source, min_survival=MIN_SURVIVAL),
        "rows": rows,
    }
    results.write(arguments.out, result)
    print(tables(result))


def metadata(**conditions: Any) -> dict[str, Any]:
    """Of a result on how long drafts take: how they were made, and further conditions."""
    return results.metadata(
        new_tokens_per_step=NEW_TOKENS,
        num_speculative_tokens=NUM_DRAFT_TOKENS,
        top_k=TOP_K,
        block_size=BLOCK_SIZE,
        **conditions,
    )


def real_tokens(arguments: argparse.Namespace, count: int) -> tuple[np.ndarray, int, str]:
    """``count`` tokens of text: the questions of a file one after the other, else Python's library.

    Returns:
        ``[count]`` int32; the size of the vocabulary; where the text comes from.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.data is not None:
        try:
            texts = [question.text for question in data.read_questions(arguments.data)]
        except (data.DataError, OSError) as error:
            sys.exit(f"error: {error}")
        source = arguments.data.name
    else:
        texts = [inspect.getsource(importlib.import_module(name)) for name in _SOURCES]
        source = "sources of Python's standard library"
    tokens = np.concatenate([np.array(tokenizer.encode(text), np.int32) for text in texts])
    if len(tokens) < count:
        sys.exit(f"error: {source} has {len(tokens)} tokens, and {count} are needed: ask for shorter --lengths")
    return tokens[:count], len(tokenizer), source


def made_up_alignment(tokens: np.ndarray, vocab_size: int) -> AlignmentView:
    """A store in random block order; half of its positions predict their true successor first."""
    rng = np.random.default_rng(0)
    num_tokens = len(tokens)
    ids = rng.integers(0, vocab_size, (num_tokens, TOP_K)).astype(np.int32)
    truth = np.append(tokens[1:], 0)
    ids[np.arange(num_tokens), np.where(rng.random(num_tokens) < 0.5, 0, TOP_K - 1)] = truth
    probs = -np.sort(-rng.dirichlet(np.full(TOP_K + 1, 0.5), num_tokens).astype(np.float32)[:, :TOP_K], axis=1)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    block_table = rng.permutation(num_blocks).astype(np.int32)
    table = np.full((num_blocks * BLOCK_SIZE, 1 + 2 * TOP_K), -1, np.int32)
    positions = np.arange(num_tokens)
    slots = block_table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    table[slots] = np.concatenate([tokens[:, None], ids, probs.view(np.int32)], axis=1)
    return AlignmentView(table, block_table, BLOCK_SIZE)


def check_against_twin(tokens: np.ndarray, view: AlignmentView, vocab_size: int) -> None:
    """Compare what is timed with its plain twin on the beginning of the context.

    Raises:
        SystemExit: if they draft differently; nothing is timed then.
    """
    drafter = Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL)
    scores, seen = np.zeros(vocab_size, np.float32), np.empty(4096, np.int32)
    starts = np.empty(NUM_ORDERS, np.int32)
    for length in range(len(tokens) // 2, len(tokens), 17):
        got, _ = drafter.draft("check", tokens[:length], view, NUM_DRAFT_TOKENS)
        index = SuffixIndex(NUM_ORDERS, NUM_DRAFT_TOKENS, length)
        index.extend(tokens[:length])
        drafts, survival = np.empty(NUM_DRAFT_TOKENS, np.int32), np.empty(NUM_DRAFT_TOKENS, np.float32)
        lookups = np.zeros(3, np.int64)
        constants = *DEFAULT_WEIGHTS, *no_prior(), MAX_MATCHES, np.float32(MIN_SURVIVAL)
        request = index.tokens, index.prev, index.head, index.length
        count = draft_reference.draft(*request, *view, *constants, scores, seen, starts, drafts, survival, lookups)
        want = drafts[:count].tolist()
        if got.tolist() != want:
            sys.exit(f"at {length} tokens the drafter has {got.tolist()}, and its twin {want}")


def time_drafter(
    tokens: np.ndarray, length: int, num_steps: int, view: AlignmentView, vocab_size: int
) -> dict[str, float]:
    """Drafts of one request, ``length`` tokens long at first; taking in the new tokens is included."""
    drafter = Drafter(vocab_size, NUM_DRAFT_TOKENS, MIN_SURVIVAL)
    drafter.draft("timed", tokens[:length], view, 0)
    drafted = []

    def call(context: np.ndarray) -> None:
        drafted.append(len(drafter.draft("timed", context, view, NUM_DRAFT_TOKENS)[0]))

    times = microseconds([lambda c=context: call(c) for context in growing(tokens, length, num_steps)])
    return {**times, "draft_tokens": round(float(np.mean(drafted)), 2)}


def time_ngram(tokens: np.ndarray, length: int, num_steps: int) -> dict[str, float]:
    """The same contexts through vLLM's n-gram proposer, at its best settings (1 to 3 tokens, 5 drafts)."""
    vllm_ngram = proposer(len(tokens) + NEW_TOKENS - 1)
    batch = tokens[None]
    drafted = []

    def call(num_tokens: int) -> None:
        proposals = vllm_ngram.propose(5, [[0]], np.array([num_tokens], np.int32), batch)
        drafted.append(len(proposals[0]))

    times = microseconds([lambda c=context: call(len(c)) for context in growing(tokens, length, num_steps)])
    return {**times, "draft_tokens": round(float(np.mean(drafted)), 2)}


def time_index(tokens: np.ndarray, length: int, repeats: int = 20) -> tuple[dict[str, float], int]:
    """Take in a fresh prompt of ``length`` tokens; its index's size in bytes comes with the time."""
    sizes = []

    def call() -> None:
        index = SuffixIndex(NUM_ORDERS, NUM_DRAFT_TOKENS, length)
        index.extend(tokens[:length])
        sizes.append(index.nbytes)

    return microseconds([call] * repeats), sizes[0]


def growing(tokens: np.ndarray, length: int, num_steps: int) -> Iterator[np.ndarray]:
    """The contexts of a request from step to step."""
    for step in range(1, num_steps + 1):
        yield tokens[: length + NEW_TOKENS * step]


def tables(result: dict) -> str:
    """The result as text."""
    kinds = ("aligned", "without_alignment", "vllm_ngram", "index_build")
    rows = [
        [
            f"{row['context_tokens']}",
            *(f"{row[kind]['median']:.1f} (p95 {row[kind]['p95']:.1f})" for kind in kinds),
            f"{row['index_bytes'] / 2**20:.2f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "context",
        "aasd, us",
        "aasd without alignment, us",
        "vLLM ngram, us",
        "index of a prompt, us",
        "MiB",
    ]
    return "\n".join((results.heading(result), "", results.table(header, rows)))


if __name__ == "__main__":
    main()
