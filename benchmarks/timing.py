"""Timing: how long one call of something takes, in microseconds."""

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np


def microseconds(calls: Sequence[Callable[[], object]], warm_up: int = 3) -> dict[str, float]:
    """Time calls one by one.

    Args:
        calls: each is called once, so that one may leave state to the next. The first ``warm_up`` don't
        count.
        warm_up: calls that compile, and fill caches.

    Returns:
        ``{"median": ..., "p95": ..., "calls": ...}``
    """
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for call in calls:
            begin = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - begin)
    finally:
        if collecting:
            gc.enable()
    measured = np.array(times[warm_up:]) / 1000
    median, p95 = np.percentile(measured, (50, 95))
    return {"median": round(float(median), 2), "p95": round(float(p95), 2), "calls": len(measured)}
