"""What a run adds up to, for its report."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from aasd_testing.fuzz.cases import Case
from aasd_testing.fuzz.observed import Observation
from aasd_testing.fuzz.oracle import Finding, failures

SETTLING_MINUTES = 10.0
"""Cut from the memory's slope: caches fill, and compiled code is loaded."""


class Tally:
    """Counts of one engine's rounds."""

    def __init__(self) -> None:
        self._kinds: collections.Counter[str] = collections.Counter()
        self._events: collections.Counter[str] = collections.Counter()
        self._findings: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._memory: list[tuple[float, float, float]] = []
        self._longest_gap = 0.0
        self._look: dict[str, Any] = {}
        # What an engine told last that has died since.
        self._earlier: list[dict[str, Any]] = []

    def restarted(self) -> None:
        """Another engine follows, which counts from nothing."""
        self._earlier.append(self._look)
        self._look = {}

    def add(
        self,
        case: Case,
        seen: Sequence[Observation | None],
        findings: Sequence[Finding],
        look: dict[str, Any],
        minutes: float,
    ) -> None:
        """Take in a round.

        Args:
            case: that was run.
            seen: of it.
            findings: of it.
            look: what the worker told of itself afterwards.
            minutes: since the engine's first round began.
        """
        self._counts["rounds"] += 1
        self._findings.update(finding.what for finding in findings)
        for step, one in zip(case["steps"], seen, strict=True):
            if step["do"] != "ask":
                self._events[step["do"]] += 1
                continue
            self._kinds[step["kind"]] += 1
            if one is None:
                continue
            tokens = sum(len(choice.token_ids or ()) for choice in one.choices)
            compared = step["compared"] and one.status == 200 and tokens > 0
            self._counts.update(
                requests=1,
                answered=one.status == 200 and not one.left,
                refused=one.status in (400, 404),
                left=one.left,
                aborted=any(choice.finish_reason == "abort" for choice in one.choices),
                tokens=tokens,
                compared=compared,
                compared_tokens=tokens * compared,
            )
            self._longest_gap = max(self._longest_gap, one.longest_gap)
        if look:
            self._look = look
            self._memory.append((minutes, look["rss_mib"], look.get("server_mib", look["rss_mib"])))

    def result(self) -> dict[str, Any]:
        """Everything counted, as JSON has it."""
        return {
            **{name: int(count) for name, count in sorted(self._counts.items())},
            "failures": sum(self._findings[what] for what in self._findings if what != "near_tie"),
            "mismatches": self._findings["mismatch"],
            "near_ties": self._findings["near_tie"],
            "findings": dict(self._findings),
            "preemptions": self._metric("vllm:num_preemptions"),
            "draft_tokens": self._metric("vllm:spec_decode_num_draft_tokens"),
            "accepted_tokens": self._metric("vllm:spec_decode_num_accepted_tokens"),
            "faults_injected": self._injected(),
            "engines_lost": len(self._earlier),
            "steps": self._look.get("steps", {}),
            "longest_gap_seconds": self._longest_gap,
            "memory": self._memory_figures(),
            "requests_by_kind": dict(sorted(self._kinds.items())),
            "events": dict(sorted(self._events.items())),
        }

    def _looks(self) -> list[dict[str, Any]]:
        return [*self._earlier, self._look]

    def _injected(self) -> dict[str, int]:
        injected: collections.Counter[str] = collections.Counter()
        for look in self._looks():
            injected.update(look.get("injected", {}))
        return dict(injected)

    def _metric(self, name: str) -> int:
        """A counter of vLLM's, whose page calls it a total."""
        shown = [look.get("metrics", {}) for look in self._looks()]
        return int(sum(metrics.get(f"{name}_total", metrics.get(name, 0)) for metrics in shown))

    def _memory_figures(self) -> dict[str, Any]:
        if not self._memory:
            return {}
        late = [sample for sample in self._memory if sample[0] >= SETTLING_MINUTES]
        return {
            "worker_mib_per_hour": slope([(minutes, worker) for minutes, worker, _ in late]),
            "server_mib_per_hour": slope([(minutes, server) for minutes, _, server in late]),
            "last_worker_mib": round(self._memory[-1][1], 1),
            "largest_worker_mib": round(max(worker for _, worker, _ in self._memory), 1),
            "minutes_worker_server_mib": [[round(value, 2) for value in sample] for sample in self._memory],
        }


def slope(samples: Sequence[tuple[float, float]]) -> float | None:
    """The least-squares slope of (minutes, MiB) in MiB per hour; None for less than ten minutes."""
    if len(samples) < 3 or samples[-1][0] - samples[0][0] < 10:
        return None
    minutes, mib = np.array(samples, float).T
    return round(float(np.polyfit(minutes / 60, mib, 1)[0]), 2)


def has_failed(findings: Sequence[Finding]) -> bool:
    """Whether anything but near ties was found."""
    return bool(failures(findings))
