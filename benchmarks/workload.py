"""What acceptance is measured on: real questions, answered greedily, one engine per setting."""

import argparse
import pathlib
import sys
from typing import Any

from benchmarks import results
from benchmarks.data import GROUPS, DataError, chat_token_ids, choose, read_questions
from benchmarks.engine import run_engine


def add_arguments(parser: argparse.ArgumentParser, *, limit: int, dtype: str) -> None:
    """Add the arguments that `Workload` reads, with a benchmark's own defaults for two of them."""
    results.add_model_argument(parser)
    parser.add_argument(
        "--data", type=pathlib.Path, help="questions, in the format of Spec-Bench's question.jsonl"
    )
    parser.add_argument(
        "--limit", type=_positive, default=limit, help="questions per category (default %(default)s)"
    )
    parser.add_argument("--max-tokens", type=_positive, default=96, help="per answer (default %(default)s)")
    parser.add_argument(
        "--concurrency", type=_positive, default=8, help="requests in a batch at once (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default=dtype, help="default %(default)s"
    )
    parser.add_argument("--max-model-len", type=_positive, default=4096, help="default %(default)s")


class Workload:
    """The chosen questions as token ids, and the engine settings that all runs share.

    Args:
        arguments: those of `add_arguments`.

    Raises:
        SystemExit: without data, or with data that can't be used; the message says why.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        results.require_model(arguments)
        if arguments.data is None:
            sys.exit(
                "--data FILE is needed: questions in the format of Spec-Bench's question.jsonl, one a line"
            )
        self._arguments = arguments
        longest = arguments.max_model_len - arguments.max_tokens
        try:
            self.questions = choose(read_questions(arguments.data), GROUPS, arguments.limit)
            texts = [question.text for question in self.questions]
            self.prompts = chat_token_ids(arguments.model, texts, longest)
        except (DataError, OSError) as error:
            sys.exit(f"error: {error}")
        self.groups = [question.group for question in self.questions]

    def metadata(self, **conditions: Any) -> dict[str, Any]:
        """Metadata of a result on this workload."""
        return results.metadata(
            **{key: value for key, value in vars(self._arguments).items() if key not in ("out", "show")},
            num_questions=len(self.questions),
            sampling="greedy",
            enforce_eager=True,
            **conditions,
        )

    def generate(self, label: str, speculative_config: dict[str, Any] | None, **sampling: Any) -> list[dict]:
        """Answer every question; see `benchmarks.engine.run_engine` for what comes back.

        Args:
            label: how the run is called.
            speculative_config: vLLM's; None for no speculation.
            **sampling: besides temperature 0 and the length of an answer.
        """
        engine = self._engine()
        if speculative_config is not None:
            engine |= {"speculative_config": speculative_config, "per_request_spec_decode_metrics": "summary"}
        params = {"temperature": 0.0, "max_tokens": self._arguments.max_tokens, **sampling}
        requests = [{"prompt_token_ids": prompt, "sampling": params} for prompt in self.prompts]
        return run_engine(label, engine, requests)

    def _engine(self) -> dict[str, Any]:
        return {
            "model": self._arguments.model,
            "dtype": self._arguments.dtype,
            "max_model_len": self._arguments.max_model_len,
            "max_num_seqs": self._arguments.concurrency,
            # Compiling takes longer than it saves here, and no figure depends on time.
            "enforce_eager": True,
        }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it takes an integer of at least 1")
    return value
