"""The verify ops' policies, from values by name."""

import torch

from vllm_aasd.kernels.verify import policies as columns
from vllm_aasd.kernels.verify.policies import NUM_PARAMETERS, NUM_STATES, STRICT, VerifyPolicies

INF = float("inf")
# Where nothing is said: loose bars, no floor to speak of, no collapse guard, a large budget.
PARAMETERS = {
    columns.CONDITIONAL: {"alpha": 0.1, "beta": 0.5},
    columns.FLY: {"window": 1, "threshold": 0.3},
    columns.BUDGET: {"cap": 0.5, "per_step": 100, "nats": 100.0, "kappa": 0.1},
}
GUARDS = {"floor": 0.1, "limit": INF, "decay": 0.9, "cooldown": 4}
STATES = {"spent": 0.0, "level": 0.0, "strict_left": 0.0, "exhausted": 0.0}
RELAXED = tuple(PARAMETERS)


def policy_tensors(rules, **given):
    """Policies of requests 0, 1, ...

    Args:
        rules: the rule of each.
        **given: parameters, guards and initial states by name, one value for all or one for each request; names that
            a request's rule doesn't have are ignored for it.
    """
    n = len(rules)
    parameters, state = torch.zeros(n, NUM_PARAMETERS), torch.zeros(n, NUM_STATES)
    known = {name for names in (*PARAMETERS.values(), GUARDS, STATES) for name in names}
    assert set(given) <= known, set(given) - known
    for i, rule in enumerate(rules):

        def value(name, default, i=i):
            asked = given.get(name, default)
            return asked if isinstance(asked, int | float) else float(asked[i])

        for tensor, names in ((parameters, PARAMETERS.get(rule, {}) | GUARDS), (state, STATES)):
            for name, default in names.items():
                tensor[i, getattr(columns, name.upper())] = value(name, default)
    rows = torch.arange(n, dtype=torch.int32)
    return VerifyPolicies(torch.tensor(rules, dtype=torch.int32), parameters, rows, state)


def strict(n):
    """Policies of n strict requests."""
    return policy_tensors([STRICT] * n)


def copied(policies):
    """The same policies with a state of their own."""
    return policies._replace(state=policies.state.clone())
