"""The measuring loop: several engines in turn over the same prompts, in rounds."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.engine import Engine

Sizes = Mapping[int, Mapping[str, int]]
"""By concurrency and category, how many prompts are sent."""


class Place(NamedTuple):
    """What was measured: one method's answers to one category at one concurrency, in one round and pass (from 0)."""

    method: str
    category: str
    concurrency: int
    round: int
    visit: int


Found = dict[Place, dict[str, Any]]
"""By place, ``seconds`` (wall time) and ``rows``, one per request.

A row has ``prompt`` (its number in the category), ``token_ids``, decode ``steps`` (after the prefill's), ``drafted``
and ``accepted`` draft tokens, ``ttft_ms`` (to the first token), ``decode_ms`` (from there to the last), and
``share``: what part of its latency counts, so that the latencies of requests in flight together add up to wall time.
"""


def units(by_category: Mapping[str, int], concurrency: int) -> Iterator[tuple[str, range]]:
    """What is sent in one go: one prompt at concurrency 1, else all prompts of a category."""
    for category, size in by_category.items():
        width = 1 if concurrency == 1 else size
        for begin in range(0, size, width):
            yield category, range(begin, min(begin + width, size))


def measure(
    engines: Mapping[str, Engine],
    requests: Mapping[str, Sequence[dict[str, Any]]],
    sizes: Sizes,
    num_rounds: int,
    num_passes: int,
    found: Found,
    save: Callable[[Found], None],
) -> None:
    """Run everything by every method; the methods' order changes with every unit.

    In a round, at each concurrency, engines first forget earlier answers; then all prompts come `num_passes` times. The
    later passes show what a method gains from answers that it has seen.

    Args:
        engines: by method, all ready.
        requests: by category; see `Engine.run`.
        sizes: how many of the requests are sent.
        num_rounds, num_passes: see above.
        found: what is measured is added. A round at a concurrency that is in it isn't run again.
        save: called with `found` after each round at a concurrency.
    """
    known = {(place.round, place.concurrency) for place in found}
    todo = [(number, c) for number in range(num_rounds) for c in sizes if (number, c) not in known]
    progress = Progress(num_passes * sum(sum(sizes[concurrency].values()) for _, concurrency in todo))
    for number, concurrency in todo:
        new: Found = {}
        for engine in engines.values():
            engine.forget()
        for visit in range(num_passes):
            for turn, (category, prompts) in enumerate(units(sizes[concurrency], concurrency), number):
                wanted = staggered([requests[category][index] for index in prompts], concurrency)
                labels = list(engines)
                shift = turn % len(labels)
                for label in [*labels[shift:], *labels[:shift]]:
                    answers, seconds = engines[label].run(wanted, concurrency)
                    place = Place(label, category, concurrency, number, visit)
                    entry = new.setdefault(place, {"seconds": 0.0, "rows": []})
                    entry["seconds"] += seconds
                    entry["rows"] += rows_of(answers, seconds, prompts)
                progress(len(prompts))
        found |= new
        save(found)


def staggered(requests: Sequence[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """The requests of a unit, those that begin together cut to different lengths.

    Answers of one length that begin together end together, wave after wave, if every step brings each a token: then no
    answer ever waits while another's prompt is read. With speculation they drift apart, and some do. A server sees no
    such waves, and a method isn't to be charged for breaking them. So of the first `concurrency` answers the i-th
    gets ``i / concurrency`` of its tokens, by every method.
    """
    cut = []
    for number, request in enumerate(requests, 1):
        longest = request["sampling"]["max_tokens"]
        allowed = max(1, longest * number // concurrency) if number < concurrency else longest
        cut.append(request | {"sampling": request["sampling"] | {"max_tokens": allowed}})
    return cut


def rows_of(answers: Sequence[dict[str, Any]], seconds: float, prompts: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of one run; see `Found`."""
    latencies = [answer["last_token"] - answer["sent"] for answer in answers]
    return [
        {
            "prompt": prompt,
            "token_ids": answer["token_ids"],
            "steps": answer["steps"] - 1,
            "drafted": answer["drafted"],
            "accepted": answer["accepted"],
            "ttft_ms": 1000 * (answer["first_token"] - answer["sent"]),
            "decode_ms": 1000 * (answer["last_token"] - answer["first_token"]),
            "share": seconds / sum(latencies),
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


class Progress:
    """Prints how far the loop is and how long it will still take, at most once a minute; `total` is requests in all."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()

    def __call__(self, num_requests: int) -> None:
        """Count requests that every method has answered."""
        self._done += num_requests
        now = time.monotonic()
        if now - self._said > 60 or self._done == self._total:
            self._said = now
            left = (now - self._began) * (self._total / self._done - 1) / 60
            text = f"{self._done} of {self._total} requests answered by every method, about {left:.0f} min left"
            print(text, file=sys.stderr, flush=True)
