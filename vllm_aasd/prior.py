"""Build the prior of a model: what it predicts outside of any request, for drafts to start from.

    python -m vllm_aasd.prior MODEL [--top-k 8] [--conversations 1024] [--output FILE] [--force]
                              [--give-up-beyond MINUTES] [arguments of vLLM's engine]

Runs the model once over its vocabulary, then lets it make up conversations, and keeps what it predicted after the
n-grams in them, not the text. The result is written to a cache folder, under a name derived from the model's content,
where a server with method ``aasd`` finds it. On a cluster, run it on each node, or put ``AASD_CACHE_ROOT`` on a file
system that the nodes share.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vllm_aasd.drafting import own_text
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.own_text import Text
from vllm_aasd.drafting.tensor_file import TensorFileError

DEFAULT_TOP_K = 8
DEFAULT_CONVERSATIONS = 1024
_REPORT_SECONDS = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with a message, where the model's files or the arguments are of no use.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.prior",
        description="Make the prior of a model, for `vllm serve` with method aasd to draft from.",
        epilog="All other arguments are those of vLLM's engine, such as --tensor-parallel-size 2.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="path or name of the target model")
    parser.add_argument("--top-k", type=_top_k, default=DEFAULT_TOP_K, help="successors kept of each token")
    parser.add_argument(
        "--conversations",
        type=_count,
        default=DEFAULT_CONVERSATIONS,
        metavar="N",
        help="questions that the model makes up and answers, to learn from; 0 for the vocabulary alone",
    )
    parser.add_argument("--output", type=Path, help="file to write (default: where the server looks for it)")
    parser.add_argument("--force", action="store_true", help="make it again where there is one")
    parser.add_argument(
        "--give-up-beyond",
        type=float,
        default=math.inf,
        metavar="MINUTES",
        help="don't build it if the vocabulary would take longer, and stop conversations then (default: no limit)",
    )
    ours, engine_arguments = parser.parse_known_args(arguments)

    # Here, so that --help doesn't wait for vLLM.
    from vllm_aasd.engine import conversations, successors

    engine = successors.engine_arguments(ours.model, engine_arguments, ours.top_k)
    key = successors.key_of(engine)
    if key is None:
        sys.exit(f"error: the files of {ours.model!r} are not on this machine; download the model first")
    path = ours.output or prior_file.cache_path(key)
    if path is None:
        sys.exit("error: no folder to keep the prior in: set AASD_CACHE_ROOT to an absolute path, or use --output")
    if not ours.force:
        try:
            # As the server does, so that both say the same of it.
            prior_file.load(path, key, successors.vocab_size(engine))
            print(f"there already: {path}")
            return
        except FileNotFoundError:
            pass
        except TensorFileError as error:
            sys.exit(f"error: {error}; --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before the work, not after it.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        sys.exit(f"error: {path.parent} can't be written to ({error}): set AASD_CACHE_ROOT, or use --output")
    llm = successors.start(engine)
    began = time.monotonic()
    try:
        prior = successors.successors(llm, ours.top_k, _Progress(60 * ours.give_up_beyond))
    except _TooSlow as too_slow:
        print(f"not made: it would take {too_slow.args[0] / 60:.0f} minutes here")
        return
    made_up = conversations.conversations(llm, ours.conversations, ours.top_k)
    texts = _in_time(made_up, ours.conversations, began + 60 * ours.give_up_beyond)
    prior_file.save(path, own_text.with_texts(prior, texts), key)
    print(f"written: {path}")


def _in_time(made_up: Iterator[tuple[int, list[Text]]], count: int, deadline: float) -> list[Text]:
    """The texts of as many conversations as there is time for, judged by the batch before; says how far it is.

    Args:
        made_up: how many there are, and their texts, by batch.
        count: how many there are to be.
        deadline: by `time.monotonic`.
    """
    texts: list[Text] = []
    before = time.monotonic()
    while before < deadline and (batch := next(made_up, None)) is not None:
        done, new = batch
        texts += new
        now = time.monotonic()
        took, before = now - before, now
        is_last = now + took > deadline and done < count
        print(f"{done} of {count} conversations" + (", for there is no time for more" if is_last else ""), flush=True)
        if is_last:
            break
    return texts


class _TooSlow(Exception):
    """Making the prior would take longer than it may; holds the seconds."""


class _Progress:
    """Says every few seconds how far it is, one line each: it ends in log files as often as on a terminal.

    Args:
        most_seconds: what all of it may take, judged by what is done.

    Raises:
        _TooSlow: when called, where it would take longer.
    """

    def __init__(self, most_seconds: float) -> None:
        self._began = self._said = time.monotonic()
        self._most_seconds = most_seconds

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if (now - self._began) * of / done > self._most_seconds:
            raise _TooSlow((now - self._began) * of / done)
        if now - self._said >= _REPORT_SECONDS:
            self._said = now
            left = (now - self._began) * (of - done) / done
            print(f"{done} of {of} tokens, {left:.0f} s left", flush=True)


def _top_k(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= prior_file.MAX_SUCCESSORS:
        raise argparse.ArgumentTypeError(
            f"{text} is not allowed: it takes an integer from 1 to {prior_file.MAX_SUCCESSORS}"
        )
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it takes an integer from 0")
    return int(text)


if __name__ == "__main__":
    main()
