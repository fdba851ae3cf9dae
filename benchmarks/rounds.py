"""The measuring loop: several engines in turn over the same prompts, in rounds."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.engine import Engine, progress_line

COLUMNS = (
    "prompt",
    "tokens",
    "steps",
    "drafted",
    "accepted",
    "ttft_ms",
    "decode_ms",
    "charged_ms",
)
"""Of a row, which is one request.

``prompt`` is its number in the category; ``tokens`` were emitted, in ``steps`` decode steps behind the
prefill's; ``drafted`` and ``accepted`` are draft tokens; ``ttft_ms`` is from sending it to its first token,
``decode_ms`` from there to its last. ``charged_ms`` is its share of the batch run's wall time, in proportion
to its latency (``ttft_ms`` and ``decode_ms`` together): the rows of a batch run add up to the run.
"""


class Unit(NamedTuple):
    """One batch run, as every method has to do it.

    Attributes:
        number: of this round, from 0.
        round: from 0.
        concurrency: requests in flight.
        category: of its prompts.
        prompts: their numbers in the category.
    """

    number: int
    round: int
    concurrency: int
    category: str
    prompts: range


class Measurement(NamedTuple):
    """What one method did in one category, round and concurrency.

    Attributes:
        rows: see `COLUMNS`.
        seconds: wall time of the batch runs.
        drafted_at, accepted_at: draft tokens by position.
        token_ids: the answers, one per row; not kept in the result.
    """

    rows: list[list[float]]
    seconds: float
    drafted_at: list[int]
    accepted_at: list[int]
    token_ids: list[list[int]]


Place = tuple[str, str, int, int]
"""Method, category, concurrency and round."""


def units(sizes: Mapping[int, Mapping[str, int]], num_rounds: int) -> Iterator[Unit]:
    """All batch runs in their order: for one request at a time, each prompt is one; else a whole category is.

    Args:
        sizes: by concurrency and category, how many prompts.
        num_rounds: so many times over everything.
    """
    for round_number in range(num_rounds):
        number = 0
        for concurrency, by_category in sizes.items():
            for category, size in by_category.items():
                width = 1 if concurrency == 1 else size
                for begin in range(0, size, width):
                    prompts = range(begin, begin + width)
                    yield Unit(number, round_number, concurrency, category, prompts)
                    number += 1


def rotated(labels: Sequence[str], unit: Unit) -> list[str]:
    """The order of the methods in a unit: A B C, then B C A, on with every unit and with every round."""
    shift = (unit.number + unit.round) % len(labels)
    return [*labels[shift:], *labels[:shift]]


def measure(
    engines: Mapping[str, Engine],
    requests: Mapping[str, Sequence[dict[str, Any]]],
    sizes: Mapping[int, Mapping[str, int]],
    num_rounds: int,
    found: dict[Place, Measurement],
    done: Callable[[int, bool], None],
    save: Callable[[dict[Place, Measurement]], None],
) -> None:
    """Run every unit by every method.

    Args:
        engines: by method, all ready.
        requests: by category; see `Engine.run`.
        sizes: by concurrency and category, how many of the requests are sent.
        num_rounds: so many times over everything.
        found: what is measured goes here. A pass (a round at one concurrency) that is there isn't run again.
        done: called behind each unit with how many requests it had, and whether they were run.
        save: called behind each pass, with ``found``.
    """
    for (number, concurrency), members in itertools.groupby(
        units(sizes, num_rounds), lambda unit: (unit.round, unit.concurrency)
    ):
        is_known = any(place[2:] == (concurrency, number) for place in found)
        if not is_known:
            found |= measure_pass(engines, requests, members, done)
            save(found)
            continue
        for unit in members:
            done(len(unit.prompts), False)


def measure_pass(
    engines: Mapping[str, Engine],
    requests: Mapping[str, Sequence[dict[str, Any]]],
    members: Iterable[Unit],
    done: Callable[[int, bool], None],
) -> dict[Place, Measurement]:
    """Run the units of one pass; see `measure`. Engines forget before it; no prompt comes twice in it."""
    found: dict[Place, Measurement] = {}
    for engine in engines.values():
        engine.forget()
    for unit in members:
        for label in rotated(list(engines), unit):
            wanted = staggered([requests[unit.category][index] for index in unit.prompts], unit.concurrency)
            answers, seconds = engines[label].run(wanted, unit.concurrency)
            place = label, unit.category, unit.concurrency, unit.round
            earlier = found.get(place, Measurement([], 0.0, [], [], []))
            found[place] = joined(earlier, measurement(answers, seconds, unit.prompts))
        done(len(unit.prompts), True)
    return found


def staggered(requests: Sequence[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """The requests of a batch run, those that begin together cut to different lengths.

    Answers of one length that begin together end together, wave after wave, if every step brings each a token: then
    no answer ever waits while another's prompt is read. With speculation they drift apart, and some do. A server sees
    no such waves, and a method isn't to be charged for breaking them. So of the first ``concurrency`` answers the
    ``i``-th may have the ``i / concurrency``-th part of its tokens, by every method.

    Args:
        requests: see `Engine.run`.
        concurrency: so many of them are in flight.
    """
    cut = []
    for number, request in enumerate(requests, 1):
        longest = request["sampling"]["max_tokens"]
        allowed = max(1, longest * number // concurrency) if number < concurrency else longest
        cut.append(request | {"sampling": request["sampling"] | {"max_tokens": allowed}})
    return cut


def measurement(answers: Sequence[dict[str, Any]], seconds: float, prompts: Sequence[int]) -> Measurement:
    """What the answers of one batch run come to.

    Args:
        answers: see `Engine.run`.
        seconds: the run's wall time.
        prompts: the number of each answer's prompt in the category.
    """
    latencies = [answer["last_token"] - answer["sent"] for answer in answers]
    rows = []
    for prompt, answer, latency in zip(prompts, answers, latencies, strict=True):
        times = (
            answer["first_token"] - answer["sent"],
            answer["last_token"] - answer["first_token"],
            seconds * latency / sum(latencies),
        )
        counts = (len(answer["token_ids"]), len(answer["emitted"]) - 1)
        drafts = (answer["draft_tokens"], answer["accepted_tokens"])
        rows.append([prompt, *counts, *drafts, *(round(one * 1000, 1) for one in times)])
    depth = max((max(answer["drafted"], default=0) for answer in answers), default=0)

    def at_positions(key: str) -> list[int]:
        return [sum(n > i for answer in answers for n in answer[key]) for i in range(depth)]

    token_ids = [answer["token_ids"] for answer in answers]
    return Measurement(rows, seconds, at_positions("drafted"), at_positions("accepted"), token_ids)


def joined(one: Measurement, other: Measurement) -> Measurement:
    """Two measurements of the same place as one."""
    return Measurement(
        one.rows + other.rows,
        one.seconds + other.seconds,
        _sums(one.drafted_at, other.drafted_at),
        _sums(one.accepted_at, other.accepted_at),
        one.token_ids + other.token_ids,
    )


class Progress:
    """How far the loop is, and how long it will still take; the second guess is better in the second round.

    Args:
        total: requests in all.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._run = 0
        self._began = time.monotonic()
        self._said = self._began

    def __call__(self, num_requests: int, was_run: bool) -> None:
        """Count requests that every method has answered; show it, on a terminal or once a minute."""
        self._done += num_requests
        self._run += num_requests * was_run
        now = time.monotonic()
        text = f"{self._done} of {self._total} requests answered by every method"
        # What is known from an interrupted run passes at once, and tells nothing of how long the rest takes.
        if self._run:
            left = (now - self._began) / self._run * (self._total - self._done)
            text += f", about {left / 60:.0f} min left"
        progress_line("" if self._done == self._total else text)
        if not sys.stderr.isatty() and now - self._said > 60:
            self._said = now
            print(text, file=sys.stderr, flush=True)


def _sums(one: list[int], other: list[int]) -> list[int]:
    short, long = sorted((one, other), key=len)
    return [a + b for a, b in zip(short, long, strict=False)] + long[len(short) :]
