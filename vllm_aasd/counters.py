"""The figures of one worker: what they are called, what they mean, and where they are counted.

The list `METRICS` is the one place that names them: what a server shows, what `vllm_aasd.metrics.get` returns and the
README's table are drawn from it.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_aasd.kernels import count
from vllm_aasd.kernels.common.mixture import HIT, MISS, STALE

PREFIX = "aasd:"
"""What every metric of ours begins with, as vLLM's do with ``vllm:``."""

LENGTH_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
TIME_BOUNDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
"""Seconds. A histogram's last bucket, beyond its bounds, is implied."""

_TENTHS = [f"{tenth / 10:.1f}-{(tenth + 1) / 10:.1f}" for tenth in range(count.SURVIVAL_BINS)]


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: without `PREFIX`, and without the suffix ``_total`` that Prometheus gives to counters.
        doc: what it counts, with its unit.
        label: what tells its series apart, beside model and engine; None for a single one.
        bounds: of a histogram's buckets; None for a counter.
    """

    name: str
    doc: str
    label: str | None = None
    bounds: tuple[float, ...] | None = None


METRICS = (
    Metric("draft_tokens", "Draft tokens verified; fillers of asynchronous scheduling don't count."),
    Metric("accepted_tokens", "Draft tokens accepted."),
    Metric("relaxed_tokens", "Of these, accepted only because the policy isn't strict."),
    Metric("regret_nats", "What relaxed tokens cost: sum of log max p - log p(x), in nats."),
    Metric("budget_exhausted", "Requests whose budget for relaxed tokens ran out."),
    Metric("collapse_guard_engaged", "Times that the collapse guard made a request strict for a while."),
    Metric("draft_length", "Draft tokens of a draft.", bounds=LENGTH_BOUNDS),
    Metric("survival_tokens", "Draft tokens verified, by the survival promised of them.", "survival"),
    Metric("survival_promised", "Of these, how many were promised to be accepted: the sum of survival.", "survival"),
    Metric("survival_accepted", "Of these, how many were accepted.", "survival"),
    Metric(
        "store_lookups",
        "Look-ups of stored predictions at matching positions: `hit`, `miss` (nothing stored), or `stale` (left by a "
        "rejected draft token).",
        "result",
    ),
    Metric("drafter_time_seconds", "Time to draft for a step's batch.", bounds=TIME_BOUNDS),
    Metric("verifier_time_seconds", "Time to verify a step's batch.", bounds=TIME_BOUNDS),
    Metric("faults", "Faults that cost speculation and no answer, by the part that failed.", "place"),
)


class Distribution(NamedTuple):
    """A histogram's values: how many fell into each bucket (one more than bounds), and their sum."""

    counts: list[float]
    sum: float


class Figure(NamedTuple):
    """The value of one series of a metric; `label` is the value of its label, empty where it has none."""

    name: str
    label: str
    value: float | Distribution


class Times:
    """A histogram of seconds, in plain Python: half a microsecond an observation."""

    def __init__(self) -> None:
        self._counts = [0.0] * (len(TIME_BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one step."""
        self._counts[bisect_left(TIME_BOUNDS, seconds)] += 1
        self._sum += seconds

    def read(self) -> Distribution:
        """What was observed so far."""
        return Distribution(list(self._counts), self._sum)


class Counters:
    """All that one worker counts, since it began to serve.

    What is counted on the device stays there until `read`, which waits for the device: not for the step.

    Args:
        device: where drafts are verified.
        faults: by place, as somebody else keeps them; none by default.

    Attributes:
        totals: ``[count.SIZE]`` float64, see `vllm_aasd.kernels.count`.
        lookups: ``[3]`` int64, see `vllm_aasd.kernels.draft.cpu.draft`.
        drafter_time, verifier_time: seconds of each step, by `observe`.
        faults: as given.
    """

    def __init__(self, device: torch.device | str, faults: Mapping[str, int] | None = None) -> None:
        self.faults = {} if faults is None else faults
        self.totals = torch.zeros(count.SIZE, dtype=torch.float64, device=device)
        self.lookups = torch.zeros(3, dtype=torch.int64, device=device)
        self.clear()

    def clear(self) -> None:
        """Begin anew, in place: what a worker runs before it serves isn't anybody's traffic."""
        self.totals.zero_()
        self.lookups.zero_()
        self.drafter_time, self.verifier_time = Times(), Times()

    def read(self) -> list[Figure]:
        """Every series, in the order of `METRICS`."""
        totals, lookups = self.totals.cpu().numpy(), self.lookups.cpu().numpy()
        by_length = totals[count.LENGTHS : count.LENGTHS + count.MAX_DRAFT_TOKENS]
        buckets = np.bincount(
            np.searchsorted(LENGTH_BOUNDS, np.arange(1, count.MAX_DRAFT_TOKENS + 1)),
            by_length,
            minlength=len(LENGTH_BOUNDS) + 1,
        )
        values: dict[str, Any] = {
            "draft_tokens": totals[count.DRAFT_TOKENS],
            "accepted_tokens": totals[count.ACCEPTED],
            "relaxed_tokens": totals[count.RELAXED],
            "regret_nats": totals[count.REGRET],
            "budget_exhausted": totals[count.EXHAUSTED],
            "collapse_guard_engaged": totals[count.GUARDED],
            "draft_length": Distribution(buckets.tolist(), float(totals[count.DRAFT_TOKENS])),
            "survival_tokens": self._by_tenth(totals, count.SURVIVAL_TOKENS),
            "survival_promised": self._by_tenth(totals, count.SURVIVAL_PROMISED),
            "survival_accepted": self._by_tenth(totals, count.SURVIVAL_ACCEPTED),
            "store_lookups": {"hit": lookups[HIT], "miss": lookups[MISS], "stale": lookups[STALE]},
            "drafter_time_seconds": self.drafter_time.read(),
            "verifier_time_seconds": self.verifier_time.read(),
            "faults": dict(self.faults),
        }
        figures = []
        for metric in METRICS:
            value = values[metric.name]
            for label, one in value.items() if metric.label else [("", value)]:
                figures.append(Figure(metric.name, label, one if metric.bounds else float(one)))
        return figures

    @staticmethod
    def _by_tenth(totals: np.ndarray, first: int) -> dict[str, float]:
        return dict(zip(_TENTHS, totals[first : first + count.SURVIVAL_BINS], strict=True))


def summary(before: list[Figure], after: list[Figure]) -> str | None:
    """What happened between two readings, in a line for the log; None if nothing was drafted."""

    def value(name: str, label: str = "") -> float:
        return _value(after, name, label) - _value(before, name, label)

    def mean_ms(name: str) -> str:
        steps = value(name) and _steps(after, name) - _steps(before, name)
        return f"{1000 * value(name) / steps:.2f} ms" if steps else "not timed"

    drafted, drafts = value("draft_tokens"), _steps(after, "draft_length") - _steps(before, "draft_length")
    if not drafted:
        return None
    known = sum(value("survival_tokens", tenth) for tenth in _TENTHS)
    words = [
        f"Drafted: {drafted:.0f} tokens, {drafted / drafts:.2f} a draft",
        f"Accepted: {100 * value('accepted_tokens') / drafted:.1f}%",
    ]
    if known:
        promised, kept = (
            sum(value(name, tenth) for tenth in _TENTHS) / known for name in ("survival_promised", "survival_accepted")
        )
        words.append(f"Promised: {100 * promised:.1f}% and kept {100 * kept:.1f}%")
    words += [
        f"Relaxed: {value('relaxed_tokens'):.0f} tokens, {value('regret_nats'):.2f} nats",
        f"Drafter: {mean_ms('drafter_time_seconds')} a step",
        f"Verifier: {mean_ms('verifier_time_seconds')} a step",
    ]
    lookups = sum(value("store_lookups", result) for result in ("hit", "miss", "stale"))
    if lookups:
        words.append(f"Store hit rate: {100 * value('store_lookups', 'hit') / lookups:.1f}%")
    return ", ".join(words)


def metrics_table() -> str:
    """The metrics as a Markdown table, as the README holds it."""
    rows = ["| metric | kind | by | what it counts |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        name, kind = PREFIX + metric.name, "histogram" if metric.bounds else "counter"
        name += "" if metric.bounds else "_total"
        rows.append(f"| `{name}` | {kind} | {f'`{metric.label}`' if metric.label else ''} | {metric.doc} |")
    return "\n".join(rows)


def _value(figures: list[Figure], name: str, label: str) -> float:
    """The value of a series, of a histogram the sum; 0 where it isn't there."""
    for figure in figures:
        if (figure.name, figure.label) == (name, label):
            return figure.value.sum if isinstance(figure.value, Distribution) else figure.value
    return 0.0


def _steps(figures: list[Figure], name: str) -> float:
    return sum(sum(figure.value.counts) for figure in figures if figure.name == name)
