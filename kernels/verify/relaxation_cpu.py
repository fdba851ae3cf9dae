"""Compiled CPU path of what verification does beyond strict; the rules are in `vllm_aasd.kernels.verify`.

Statistics of a row are computed only when needed: no rule looks at a row that the strict rule accepts (except for the
budget of sampled requests, for which the row was summed anyway), and a draft token that fails a condition without a
normalizer costs no exponentials. Since s >= 1, p(x) <= e^(z(x) - m), so a draft token with e^(z(x) - m) < floor fails
the floor, and the guard on stop tokens compares weights over the same s.
"""

import math

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import exp_nonpositive, row_max, softmax_stats, to_float32, top_three
from vllm_aasd.kernels.verify.policies import ALPHA, BETA, BUDGET, CAP, FLOOR, FLY, KAPPA, THRESHOLD

# Results of `judge`: the draft token can't be relaxed; it can't, but its row costs the budget; or it can.
CLOSED, OPEN, CANDIDATE = 0, 1, 2


@compiled
def strictly(row, x, is_greedy, uniform):
    """Return (whether the strict rule accepts draft x, maximum, argmax, s, t); s is 0 where nothing was summed."""
    if is_greedy:
        maximum, argmax = row_max(row)
        return x == argmax, maximum, argmax, 0.0, 0.0
    if not 0 <= x < row.size:
        return False, np.float32(np.nan), 0, 0.0, 0.0
    maximum, argmax, s, t = softmax_stats(row)
    if s == 0.0:
        return False, np.float32(np.nan), argmax, 0.0, 0.0
    p = np.float64(exp_nonpositive(to_float32(row[x]) - maximum)) / s
    return p > 0.0 and p >= uniform, maximum, argmax, s, t


@compiled
def _stop_weight(row, x, maximum, stops):
    """Return sum of e**(z - maximum) over the stop tokens, or inf when x is one of them."""
    weight = 0.0
    for j in range(stops.size):
        stop = stops[j]
        if stop < 0:
            break
        if stop == x:
            return np.inf
        if stop < row.size:
            weight += exp_nonpositive(to_float32(row[stop]) - maximum)
    return weight


@compiled
def _binary_kl(q, p):
    """Return the KL divergence in nats of a coin of probability q from one of p, for p <= q."""
    heads = q * math.log(q / p)
    if q >= 1.0:
        return heads
    return heads + (1.0 - q) * math.log((1.0 - q) / (1.0 - p))


@compiled
def _top_entropy(row, maximum, s):
    """Return -sum p log p over the three likeliest tokens."""
    entropy = 0.0
    for value in top_three(row):
        weight = np.float64(exp_nonpositive(value - maximum))
        if weight > 0.0:
            log_p = np.float64(value) - np.float64(maximum) - math.log(s)
            entropy -= weight / s * log_p
    return entropy


@compiled
def judge(row, x, is_greedy, is_strict, uniform, maximum, argmax, s, t, rule, parameters, stops):
    """Return (CLOSED, OPEN or CANDIDATE; its cost to the budget; regret in nats) of one row and its draft token x.

    Everything that doesn't depend on the request's state: the guards on p, and the rule without fly's window.
    `maximum` to `t` are results of `strictly`.
    """
    spends_always = rule == BUDGET and not is_greedy
    if not 0 <= x < row.size or not np.isfinite(maximum) or (is_strict and not spends_always):
        return CLOSED, 0.0, 0.0
    regret = np.float64(maximum) - np.float64(to_float32(row[x]))
    weight = np.float64(exp_nonpositive(to_float32(row[x]) - maximum))
    floor = np.float64(parameters[FLOOR])
    # The stop tokens' weight is at least 0, so exceeding it implies p > 0.
    if weight < floor or weight <= _stop_weight(row, x, maximum, stops):
        return CLOSED, 0.0, 0.0
    if rule == BUDGET and is_greedy and regret > parameters[CAP]:
        return CLOSED, 0.0, 0.0
    if s == 0.0:
        maximum, argmax, s, t = softmax_stats(row)
    p = weight / s
    if s == 0.0 or not p >= floor:
        return CLOSED, 0.0, 0.0
    if rule == BUDGET:
        if is_greedy:
            return CANDIDATE, regret, regret
        kappa = np.float64(parameters[KAPPA])
        cost = min(kappa, -math.log(min(p, 1.0)))
        if not is_strict and kappa > 0.0 and _binary_kl(uniform, p) <= kappa:
            return CANDIDATE, cost, regret
        return OPEN, cost, 0.0
    if rule == FLY:
        clears = _top_entropy(row, maximum, s) >= parameters[THRESHOLD]
    else:
        entropy = max(0.0, math.log(s) - t / s)
        clears = p >= parameters[BETA] - parameters[ALPHA] * entropy or x == argmax
    return (CANDIDATE if clears else CLOSED), 0.0, regret
