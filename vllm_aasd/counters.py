"""The metrics of one worker: what they are called, what they mean, and where they are counted.

They add to vLLM's own metrics. `METRICS` is the only place that names them: a server's ``/metrics``,
`vllm_aasd.metrics.get` and the table in the documentation follow it.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from vllm_aasd.kernels import count
from vllm_aasd.kernels.draft import HIT, MISS, STALE

PREFIX = "aasd:"
"""The prefix of each metric's name, as vLLM's have ``vllm:``."""

_TENTHS = [f"{tenth / 10:.1f}-{(tenth + 1) / 10:.1f}" for tenth in range(count.SURVIVAL_BINS)]


class Metric(NamedTuple):
    """One metric, a counter.

    Attributes:
        name: without `PREFIX`, and without the suffix ``_total`` that Prometheus gives to counters.
        doc: what it counts, with its unit.
        label: what distinguishes its series, apart from model and engine; empty if there is only one.
    """

    name: str
    doc: str
    label: str = ""


METRICS = (
    Metric("relaxed_tokens", "Draft tokens that were accepted only because the verification isn't strict."),
    Metric("regret_nats", "What these tokens cost: sum of log max p - log p(token), in nats."),
    Metric("budget_exhausted", "Requests whose budget for relaxed tokens ran out."),
    Metric("collapse_guard_engaged", "Times the collapse guard made a request strict for a while."),
    Metric(
        "survival_tokens",
        "Verified draft tokens, by the survival (probability of acceptance) that the drafter promised. Unlike vLLM's "
        "counts, without the fillers of asynchronous scheduling.",
        "survival",
    ),
    Metric("survival_promised", "Sum of the promised survival: how many of these should be accepted.", "survival"),
    Metric("survival_accepted", "How many of these were accepted.", "survival"),
    Metric(
        "grammar_draft_tokens",
        "Draft tokens beside a grammar in force, by source: `forced` by the grammar; by the "
        "grammar if white space is as the model's `style` is; a value's `end` where the copied text "
        "has one; or the drafter's, from `context`.",
        "source",
    ),
    Metric("grammar_accepted_tokens", "How many of these were accepted.", "source"),
    Metric(
        "grammar_rejected_tokens",
        "How many of these were the first of their draft to be rejected. For `forced` "
        "tokens, the target writes the text in other tokens.",
        "source",
    ),
    Metric("grammar_seconds", "Seconds that the scheduler took to draft these."),
    Metric(
        "store_lookups",
        "Look-ups of stored predictions at matching positions: `hit`, `miss` (nothing stored), or `stale` (left by a "
        "rejected draft token).",
        "result",
    ),
    Metric("faults", "Faults that cost speculation but no answer, by the part that failed.", "place"),
)


GRAMMAR_SOURCES = ("forced", "style", "end", "context")
"""Where a draft token beside a grammar comes from, in the order of `vllm_aasd.drafting.steered_draft`."""

NUM_GRAMMAR_COUNTS = 3 * len(GRAMMAR_SOURCES) + 1


class MetricValue(NamedTuple):
    """The value of one series of a metric; `labels` has the metric's own label, if it has one."""

    name: str
    labels: dict[str, str]
    value: float


class Counters:
    """All counts of one worker, since it began to serve.

    What is counted on the device stays there until `read`, which waits for the device; steps don't.

    Args:
        device: where drafts are verified.
        faults: by place, updated by their owner.

    Attributes:
        totals: ``[count.SIZE]`` float64, see `vllm_aasd.kernels.count`.
        lookups: ``[3]`` int64, see `vllm_aasd.kernels.draft.cpu.draft`.
    """

    def __init__(self, device: torch.device | str, faults: Mapping[str, int] | None = None) -> None:
        self._faults = {} if faults is None else faults
        self.totals = torch.zeros(count.SIZE, dtype=torch.float64, device=device)
        self.lookups = torch.zeros(3, dtype=torch.int64, device=device)
        self._grammar = np.zeros(NUM_GRAMMAR_COUNTS)

    def add_grammar(self, counts: np.ndarray) -> None:
        """Add what the scheduler has counted of drafts beside grammars.

        Args:
            counts: ``[NUM_GRAMMAR_COUNTS]`` float64: by source the tokens that were drafted, that were accepted, and
                that were the first of their draft to be rejected; and the seconds that this took.
        """
        self._grammar += counts

    def clear(self) -> None:
        """Reset all counts, in place: what a worker runs before it serves isn't traffic."""
        self.totals.zero_()
        self.lookups.zero_()
        self._grammar.fill(0)

    def read(self) -> list[MetricValue]:
        """Every series, in the order of `METRICS`."""
        totals, lookups = self.totals.tolist(), self.lookups.tolist()
        values: dict[str, Mapping[str, float]] = {
            "relaxed_tokens": {"": totals[count.RELAXED]},
            "regret_nats": {"": totals[count.REGRET]},
            "budget_exhausted": {"": totals[count.EXHAUSTED]},
            "collapse_guard_engaged": {"": totals[count.GUARDED]},
            "survival_tokens": dict(zip(_TENTHS, totals[count.SURVIVAL_TOKENS :], strict=False)),
            "survival_promised": dict(zip(_TENTHS, totals[count.SURVIVAL_PROMISED :], strict=False)),
            "survival_accepted": dict(zip(_TENTHS, totals[count.SURVIVAL_ACCEPTED :], strict=True)),
            "store_lookups": {"hit": lookups[HIT], "miss": lookups[MISS], "stale": lookups[STALE]},
            "grammar_seconds": {"": self._grammar[-1]},
            "faults": self._faults,
        }
        for name, of in zip(("draft", "accepted", "rejected"), np.split(self._grammar[:-1], 3), strict=True):
            values[f"grammar_{name}_tokens"] = dict(zip(GRAMMAR_SOURCES, of, strict=True))
        return [
            MetricValue(metric.name, {metric.label: label} if metric.label else {}, float(value))
            for metric in METRICS
            for label, value in values[metric.name].items()
        ]


def summary(before: list[MetricValue], after: list[MetricValue]) -> str | None:
    """A line for the log on the time between two readings; None if no draft was verified."""
    grown: dict[str, float] = defaultdict(float)
    for (name, labels, now), (_, _, earlier) in zip(after, before, strict=True):
        grown[name] += now - earlier
        if labels == {"result": "hit"}:
            grown["hits"] = now - earlier
    tokens, lookups = grown["survival_tokens"], grown["store_lookups"]
    if not tokens:
        return None
    promised, kept = (grown[f"survival_{kind}"] / tokens for kind in ("promised", "accepted"))
    relaxed = f"{grown['relaxed_tokens']:.0f} tokens ({grown['regret_nats']:.2f} nats)"
    hits = f", Store hit rate: {grown['hits'] / lookups:.1%}" if lookups else ""
    return f"Survival promised: {promised:.1%}, kept: {kept:.1%}, Relaxed: {relaxed}{hits}"


def metrics_table() -> str:
    """The metrics as a Markdown table, for the documentation."""
    rows = ["| counter | by | what it counts |", "| --- | --- | --- |"]
    for metric in METRICS:
        rows.append(f"| `{PREFIX}{metric.name}_total` | {metric.label and f'`{metric.label}`'} | {metric.doc} |")
    return "\n".join(rows)
