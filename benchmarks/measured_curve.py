"""The step-time curve of a CPU, as measured, and how well the model of `benchmarks.roofline` can follow it.

The curve was measured before the first release with vLLM 0.32 on the 2-core machine that all results are from:
SmolLM2-135M-Instruct in bfloat16, one core, the real engine with drafts of fixed lengths.
"""

from typing import Any

import numpy as np

from benchmarks.roofline import Machine, Target, step_time

SMOLLM2 = Target("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152)

DRAFTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Draft tokens per request."""

RELATIVE = {
    1: (1.05, 1.09, 1.06, 1.14, 1.18, 1.24, 1.32, 1.58, 1.81),
    4: (1.20, 1.40, 1.51, 1.75, 1.86, 2.10, 2.42, 2.98, 3.75),
    16: (1.33, 1.67, 1.90, 2.29, 2.51, 2.98, 3.77, 4.96, 6.29),
}
"""Step time relative to that without drafts, by requests in the batch and `DRAFTS`."""

SECONDS = {1: 0.013, 16: 0.041}
"""Of a step without drafts, by requests."""

CONTEXT = 512
"""Tokens per request, about; it wasn't recorded."""

LOGIT_PASSES = 2

_START = (2e10, 1e11, 1e-3)
_STEPS = (2.0, 1.4, 1.15, 1.05, 1.01)


def check(overlap: bool) -> dict[str, Any]:
    """Fit the model's three free numbers to the whole curve, and to it without four requests, which it then predicts.

    Args:
        overlap: see `Machine`.

    Returns:
        The numbers; ``mean_error`` and ``largest_error`` of the whole, and of ``predicted``: those of the four
        requests' relative step times by a fit that hasn't seen them. Errors are relative.
    """
    machine = fit(tuple(RELATIVE), overlap)
    found, held_out = errors(machine, tuple(RELATIVE)), errors(fit((1, 16), overlap), (4,))
    return {
        "bandwidth": float(machine.bandwidth),
        "arithmetic": float(machine.arithmetic),
        "request_overhead": float(machine.request_overhead),
        "mean_error": float(np.mean(found)),
        "largest_error": float(np.max(found)),
        "predicted": {"mean_error": float(np.mean(held_out)), "largest_error": float(np.max(held_out))},
    }


def fit(requests: tuple[int, ...], overlap: bool) -> Machine:
    """The machine that the curve at these numbers of requests looks like most, by squared logarithms."""

    def loss(values: np.ndarray) -> float:
        return float(np.sum(np.log1p(_signed(_machine(values, overlap), requests)) ** 2))

    best = np.array(_START)
    best_loss = loss(best)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for index in range(len(best)):
                for factor in (step, 1 / step):
                    tried = best.copy()
                    tried[index] *= factor
                    if (tried_loss := loss(tried)) < best_loss - 1e-9:
                        best, best_loss, improved = tried, tried_loss, True
    return _machine(best, overlap)


def errors(machine: Machine, requests: tuple[int, ...]) -> np.ndarray:
    """Relative errors, without sign, of the relative step times and of those of `SECONDS`."""
    return np.abs(_signed(machine, requests))


def relative(machine: Machine, num_requests: int) -> np.ndarray:
    """What the model has for an entry of `RELATIVE`."""
    tokens = num_requests * (1 + np.array([0, *DRAFTS]))
    seconds = step_time(SMOLLM2, machine, num_requests, tokens, CONTEXT, LOGIT_PASSES)
    return seconds[1:] / seconds[0]


def _machine(values: np.ndarray, overlap: bool) -> Machine:
    return Machine("the CPU", *values[:2], request_overhead=values[2], overlap=overlap)


def _signed(machine: Machine, requests: tuple[int, ...]) -> np.ndarray:
    found = [relative(machine, number) / np.array(RELATIVE[number]) - 1 for number in requests]
    plain = [
        step_time(SMOLLM2, machine, number, number, CONTEXT, LOGIT_PASSES) / SECONDS[number] - 1
        for number in requests
        if number in SECONDS
    ]
    return np.concatenate([*found, np.array(plain)])
