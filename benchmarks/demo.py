"""The demonstration: one model, the same questions, with and without aasd, side by side.

    python -m benchmarks.demo
    python -m benchmarks.demo --model Qwen/Qwen2.5-7B-Instruct --max-tokens 256 -- --max-model-len 8192

Starts ``vllm serve`` twice, first without speculation and then with ``{"method": "aasd"}``, sends each server
the same questions one at a time (greedy, streaming), and prints tokens per second, tokens per step,
acceptance, and the answers. What follows ``--`` goes to both servers.
"""

import argparse
import itertools
import json
import shutil
import signal
import sys
import textwrap
import time
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.server import Server, ServerError, SpecCounters

AASD = {"method": "aasd"}

_TEXT_LENGTH = 1800
PROMPTS = tuple(
    f"{task}\n\n{topics[topic].strip()[:_TEXT_LENGTH]}"
    for task, topic in (
        ("Summarise this text in three sentences.", "exceptions"),
        ("Quote the two most important sentences of this text, word by word.", "naming"),
        ("Rewrite this text as a list, keeping its words.", "truth"),
        ("What does this text say about the order of evaluation? Quote it.", "booleans"),
        ("Explain this text to a beginner.", "for"),
        ("Continue this text.", "with"),
    )
)
"""Questions about Python's own documentation, which comes with Python."""

WARM_UP = "Say hello."


class Answer(NamedTuple):
    """What came back for one prompt.

    Attributes:
        text: the answer.
        num_tokens: its length.
        seconds: from sending the prompt to the answer's end.
        first_token_seconds: to its first token.
        counters: what the server counted meanwhile.
    """

    text: str
    num_tokens: int
    seconds: float
    first_token_seconds: float
    counters: SpecCounters

    @property
    def tokens_per_second(self) -> float:
        """Of the whole answer, its prefill included."""
        return self.num_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens behind the first by decode steps; a step emits what it accepts and one token more."""
        steps = self.num_tokens - 1 - self.counters.accepted_tokens
        return (self.num_tokens - 1) / max(steps, 1)


def main() -> None:
    """Run the demonstration; exit code 1 and the end of the server's log if a server fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_model_argument(parser)
    parser.add_argument("--max-tokens", type=int, default=128, help="length of an answer (default %(default)s)")
    parser.add_argument("server_arguments", nargs="*", help="for both servers, behind --")
    arguments = parser.parse_args()
    results.require_model(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C: by an exception, so that the server is stopped.
        signal.signal(number, lambda *_: sys.exit(1))
    print(f"Model: {arguments.model}. {len(PROMPTS)} questions, greedy, {arguments.max_tokens} tokens at most.")
    try:
        plain = ask("without speculation", arguments, [])
        aasd = ask("with aasd", arguments, ["--speculative-config", json.dumps(AASD)])
    except ServerError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    for prompt, one, other in zip(PROMPTS, plain, aasd, strict=True):
        print(f"\n{comparison(prompt, one, other, shutil.get_terminal_size().columns)}")
    print(f"\n{summary(plain, aasd)}")


def ask(label: str, arguments: argparse.Namespace, speculation: list[str]) -> list[Answer]:
    """Start a server, ask it everything, and stop it."""
    status(f"Server {label}: starting (about a minute)\n")
    with Server(
        arguments.model,
        [*arguments.server_arguments, *speculation],
        lambda text: status(f"Server {label}: starting, {text}"),
    ) as server:
        try:
            # The first request pays for what is compiled or allocated on first use.
            answer(server, WARM_UP, 8)
            answers = []
            for number, prompt in enumerate(PROMPTS, start=1):
                status(f"Server {label}: question {number} of {len(PROMPTS)}")
                answers.append(answer(server, prompt, arguments.max_tokens))
        except Exception as error:
            raise ServerError(f"{type(error).__name__}: {error}\n{server.log_tail()}") from error
        status(f"Server {label}: stopping")
    status(f"Server {label}: {len(answers)} questions answered\n")
    return answers


def answer(server: Server, prompt: str, max_tokens: int) -> Answer:
    """Send one prompt, and take in the answer as it comes."""
    # vLLM brings it; importing it takes a second, which nobody should wait for before the first line.
    from openai import OpenAI

    before = server.spec_counters()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        pieces, first, usage = [], None, None
        begin = time.perf_counter()
        for chunk in client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                pieces.append(chunk.choices[0].delta.content)
        end = time.perf_counter()
    counters = server.spec_counters().since(before)
    return Answer("".join(pieces), usage.completion_tokens, end - begin, (first or end) - begin, counters)


def comparison(prompt: str, plain: Answer, aasd: Answer, width: int) -> str:
    """Two columns, without speculation and with aasd, marked where they first differ."""
    column = max(min(width, 200) // 2 - 2, 20)
    gain = aasd.tokens_per_second / plain.tokens_per_second
    heads = (
        f"without: {plain.tokens_per_second:.1f} tokens/s",
        f"aasd: {aasd.tokens_per_second:.1f} tokens/s, {gain:.2f}x",
    )
    columns = [
        [head, ""] + [line for part in text.splitlines() for line in textwrap.wrap(part, column) or [""]]
        for head, text in zip(heads, mark_difference(plain.text, aasd.text), strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(
        (
            f"--- {prompt.splitlines()[0]} ".ljust(width, "-"),
            f"{aasd.tokens_per_step:.2f} tokens per step; {acceptance(aasd.counters)}",
            *(f"{left.ljust(column)} | {right}".rstrip() for left, right in rows),
        )
    )


def mark_difference(one: str, other: str) -> tuple[str, str]:
    """Both texts, with ``>>`` before the first word that isn't the same; as they are if they are equal."""
    if one == other:
        return one, other
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    # Back to the beginning of the word.
    while first > 0 and not one[first - 1].isspace():
        first -= 1
    return tuple(f"{text[:first]}>>{text[first:]}" for text in (one, other))


def acceptance(counters: SpecCounters) -> str:
    """How many draft tokens were accepted, in words."""
    if not counters.draft_tokens:
        return "nothing drafted"
    rate = counters.accepted_tokens / counters.draft_tokens
    return f"{counters.accepted_tokens} of {counters.draft_tokens} draft tokens accepted ({rate:.0%})"


def summary(plain: list[Answer], aasd: list[Answer]) -> str:
    """All questions together."""

    def total(answers: list[Answer]) -> Any:
        tokens, seconds = sum(a.num_tokens for a in answers), sum(a.seconds for a in answers)
        first = sum(a.first_token_seconds for a in answers) / len(answers)
        return (
            tokens / seconds,
            first,
            SpecCounters(*map(sum, zip(*(a.counters for a in answers), strict=True))),
        )

    (plain_speed, plain_first, _), (speed, first, counters) = total(plain), total(aasd)
    decoded = sum(a.num_tokens - 1 for a in aasd)
    equal = sum(one.text == other.text for one, other in zip(plain, aasd, strict=True))
    lines = [
        f"All {len(plain)}: {plain_speed:.1f} tokens/s without, {speed:.1f} with aasd "
        f"({speed / plain_speed:.2f}x); first token after {plain_first:.2f} s and {first:.2f} s; "
        f"{decoded / max(decoded - counters.accepted_tokens, 1):.2f} tokens per step; "
        f"{acceptance(counters)}; {equal} of {len(plain)} answers are the same."
    ]
    if equal < len(plain):
        lines.append(
            'Answers may differ a little: the default, "aasd_verification": "conditional", also accepts near '
            "rivals of the model's own choice, and near ties fall either way when a batch is rounded "
            'differently. "strict" leaves only the latter.'
        )
    return "\n".join(lines)


def status(text: str) -> None:
    """What is going on: one line that overwrites itself on a terminal; elsewhere only whole lines."""
    if sys.stdout.isatty():
        shown = text if text.endswith("\n") else text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{shown}", end="", flush=True)
    elif text.endswith("\n"):
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
