"""Hard inputs for the verify ops, in the arguments that vLLM's V2 runner has, and what two paths may differ in."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from vllm_aasd.kernels import count
from vllm_aasd.kernels.verify import policies as columns
from vllm_aasd.kernels.verify.policies import (
    ALPHA,
    BETA,
    BUDGET,
    CAP,
    CONDITIONAL,
    FLOOR,
    FLY,
    KAPPA,
    NUM_PARAMETERS,
    NUM_STATES,
    STRICT,
    THRESHOLD,
    VerifyPolicies,
)
from vllm_aasd.kernels.verify.random_reference import row_uniform
from vllm_aasd.kernels.verify.relaxation_reference import binary_kl

INF, NAN = float("inf"), float("nan")
# float32 softmaxes are off by up to 3e-5 of a probability at 150k tokens: decisions nearer than this to a bar may
# differ between two paths.
MARGIN = 5e-5
# Where nothing is said: loose bars, no floor to speak of, no collapse guard, a large budget.
PARAMETERS = {
    columns.CONDITIONAL: {"alpha": 0.1, "beta": 0.5},
    columns.FLY: {"window": 1, "threshold": 0.3},
    columns.BUDGET: {"cap": 0.5, "per_step": 100, "nats": 100.0, "kappa": 0.1},
}
GUARDS = {"floor": 0.1, "limit": INF, "decay": 0.9, "cooldown": 4}
STATES = {"spent": 0.0, "level": 0.0, "strict_left": 0.0, "exhausted": 0.0}
RELAXED = tuple(PARAMETERS)


def policy_tensors(rules: Sequence[int], **given: Any) -> VerifyPolicies:
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


def strict(n: int) -> VerifyPolicies:
    """Policies of n strict requests."""
    return policy_tensors([STRICT] * n)


def copied(policies: VerifyPolicies) -> VerifyPolicies:
    """The same policies with a state of their own."""
    return policies._replace(state=policies.state.clone())


def batch(rows: Sequence[Any], drafts: Sequence[Sequence[int]], **given: Any) -> dict[str, Any]:
    """Arguments of `verify_seeded` for requests given as lists of logits rows, and of drafts per request.

    Args:
        rows: per request a [num_drafts + 1, vocab_size] tensor or nested list; of no rows for an empty one.
        drafts: per request the drafts that all but its last row test.
        **given: per request a `temperature` (default 0), `seed`; `relaxed`, whether its rule is conditional, or
            `rules`, its rule; what `policy_tensors` takes; `stops`, a list of ids per request;
            `num_speculative_steps`; `num_drafts`, without fillers (default all); `slots`, the slot of each request.
    """
    rows = [torch.as_tensor(row) for row in rows]
    counts = [len(row) for row in rows]
    num_reqs, num_logits = len(rows), sum(counts)
    slots = torch.as_tensor(given.get("slots", range(num_reqs)), dtype=torch.int64)
    max_num_reqs = int(slots.max()) + 1 if num_reqs else 1

    def by_slot(name, default, dtype=torch.float32):
        values = torch.full((max_num_reqs,), default, dtype=dtype)
        values[slots] = torch.as_tensor(given.get(name, [default] * num_reqs)).to(dtype)
        return values

    stops = given.get("stops", [[]] * num_reqs)
    stop_token_ids = torch.full((max_num_reqs, max(map(len, stops), default=0)), -1, dtype=torch.int32)
    for slot, ids in zip(slots.tolist(), stops, strict=True):
        stop_token_ids[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    # The input token of a request's first row is some token that was sampled before.
    inputs = [token for count, ids in zip(counts, drafts, strict=True) for token in [0, *ids][:count]]
    return {
        "target_logits": torch.cat(rows) if num_reqs else torch.empty(0, 2),
        "draft_sampled": torch.tensor(inputs, dtype=torch.int32),
        "num_drafts": by_slot("num_drafts", 127, torch.int32),
        "cu_num_logits": torch.tensor([0, *counts]).cumsum(0).int(),
        "pos": 1000 + torch.arange(num_logits),
        "idx_mapping": slots,
        "expanded_idx_mapping": slots.repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
        "expanded_local_pos": torch.tensor([i for n in counts for i in range(n)], dtype=torch.int32),
        "temperature": by_slot("temperature", 0.0),
        "seed": by_slot("seed", 0, torch.int64),
        "num_speculative_steps": given.get("num_speculative_steps", max(1, *counts, 1) - 1),
        "policies": _policies(slots.tolist(), max_num_reqs, given),
        "stop_token_ids": stop_token_ids,
        "survival": _survival(max_num_reqs, num_logits),
        "totals": torch.full((count.SIZE,), 0.5, dtype=torch.float64),
    }


def _survival(max_num_reqs: int, seed: int) -> torch.Tensor:
    """What was promised of 8 draft tokens, with bounds of the tenths, and tokens of which nothing was."""
    survival = torch.rand(max_num_reqs, 8, generator=torch.Generator().manual_seed(seed))
    survival[survival < 0.1] = 0.5
    survival[survival > 0.95] = 1.0
    survival[(survival > 0.6) & (survival < 0.7)] = count.UNPROMISED
    return survival


def _policies(slots: list[int], max_num_reqs: int, given: dict[str, Any]) -> VerifyPolicies:
    """By slot, from what is given by request; free slots have a rule, which nobody may look at, and all rows of the
    state are shuffled."""
    rules = given.get(
        "rules", [CONDITIONAL if relaxed else STRICT for relaxed in given.get("relaxed", [False] * len(slots))]
    )
    names = {name for names in (*PARAMETERS.values(), GUARDS, STATES) for name in names}
    values = {}
    for name in names & set(given):
        values[name] = [1.0] * max_num_reqs
        for slot, value in zip(slots, torch.as_tensor(given[name]).tolist(), strict=True):
            values[name][slot] = value
    by_slot = [CONDITIONAL] * max_num_reqs
    for slot, rule in zip(slots, rules, strict=True):
        by_slot[slot] = rule
    policies = policy_tensors(by_slot, **values)
    order = torch.randperm(max_num_reqs, generator=torch.Generator().manual_seed(max_num_reqs))
    return policies._replace(state_rows=order.int(), state=policies.state[order.argsort()].contiguous())


def random_batch(
    vocab_size: int, counts: Sequence[int], dtype: torch.dtype, seed: int, odd_rows: bool = True
) -> dict[str, Any]:
    """A batch with `counts` rows per request: every kind of request, draft and (if wanted) odd row."""
    g = torch.Generator().manual_seed(seed)
    n, num_reqs = sum(counts), len(counts)
    storage = torch.randn(n, vocab_size + 13, generator=g)
    logits = storage[:, 5 : 5 + vocab_size]
    likely = torch.randint(0, vocab_size, (n, 3), generator=g)
    logits.scatter_(1, likely, 11 + 2 * torch.randn(n, 3, generator=g))
    logits = storage.to(dtype)[:, 5 : 5 + vocab_size]
    for row in range(n):
        kind = int(torch.randint(0, 12, (), generator=g))
        if kind == 0:
            logits[row, torch.randperm(vocab_size, generator=g)[: vocab_size // 2]] = -INF
        elif kind == 1:
            logits[row] = -INF
            logits[row, likely[row, 0]] = 3.0
        elif kind == 2 and odd_rows:
            logits[row, likely[row, 1]] = NAN
        elif kind == 3 and odd_rows:
            logits[row] = -INF
        elif kind == 4:
            logits[row, likely[row, :2]] = logits[row].max()
    pick = torch.randint(0, 10, (n,), generator=g)
    argmax = logits.float().argmax(-1)
    drafts = torch.where(pick < 6, argmax, torch.where(pick < 9, likely[:, 2], -1)).tolist()
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    unit = torch.rand(9, num_reqs, generator=g)
    arguments = batch(
        [logits[start : start + count] for start, count in zip(starts, counts, strict=False)],
        [drafts[start : start + count - 1] for start, count in zip(starts, counts, strict=False)],
        slots=torch.randperm(num_reqs + 3, generator=g)[:num_reqs],
        temperature=[0.0 if i % 3 == 0 else 0.5 + float(unit[0, i]) for i in range(num_reqs)],
        seed=torch.randint(-(2**62), 2**62, (num_reqs,), generator=g),
        rules=[STRICT if i % 6 == 2 else RELAXED[(seed + i // 2) % len(RELAXED)] for i in range(num_reqs)],
        alpha=unit[1] * 0.2,
        beta=unit[2] * 0.4,
        floor=0.005 + unit[3] * 0.05,
        window=1 + (unit[4] * 3).int(),
        threshold=0.5 * unit[5],
        cap=3 * unit[6],
        per_step=1 + (unit[7] * 3).int(),
        nats=3 * unit[8],
        kappa=unit[6],
        limit=1.2 + 2 * unit[7],
        decay=0.5 + 0.5 * unit[5],
        cooldown=(3 * unit[4]).int(),
        spent=unit[1],
        level=unit[2],
        strict_left=[2 if i % 7 == 4 else 0 for i in range(num_reqs)],
        num_drafts=[int(unit[3, i] * 12) for i in range(num_reqs)],
        stops=[torch.randint(0, vocab_size, (i % 10,), generator=g).tolist() for i in range(num_reqs)],
        num_speculative_steps=max(1, *counts, 1) - 1,
    )
    # Rows of another stride than the vocabulary, as the runner's padded logits have.
    arguments["target_logits"] = logits
    return arguments


def settle(arguments: dict[str, Any]) -> int:
    """Make placeholders of the draft tokens of which a decision is too close to call in float32; returns how many."""
    vocab_size, num_near = arguments["target_logits"].shape[1], 0
    policies, drafts = arguments["policies"], arguments["draft_sampled"]
    bounds = itertools.pairwise(arguments["cu_num_logits"].tolist())
    for slot, (start, end) in zip(arguments["idx_mapping"].tolist(), bounds, strict=True):
        stop_token_ids = [stop for stop in arguments["stop_token_ids"][slot].tolist() if 0 <= stop < vocab_size]
        for row in range(start, end - 1):
            x = int(drafts[row + 1])
            probs = arguments["target_logits"][row].double().softmax(-1)
            if not 0 <= x < vocab_size or not probs[x] > 0:
                continue
            parameters = policies.parameters[slot].double()
            uniform = float(row_uniform(int(arguments["seed"][slot]), int(arguments["pos"][row])))
            # A draft that is a stop token itself is rejected without comparing anything.
            stopping = float(probs[stop_token_ids].sum()) if x not in stop_token_ids else 0.0
            bars = torch.tensor([uniform, float(parameters[FLOOR]), stopping])
            is_near = bool(((probs[x] - bars).abs() <= MARGIN * probs[x]).any())
            if is_near or abs(_over_the_bar(probs, x, int(policies.rule[slot]), parameters, uniform)) <= MARGIN:
                drafts[row + 1] = -1
                num_near += 1
    return num_near


def _over_the_bar(probs: torch.Tensor, x: int, rule: int, parameters: torch.Tensor, uniform: float) -> float:
    """By how much, in probability or nats, a draft clears the part of its rule that the row's statistics decide."""
    p, entropy = probs[x], torch.special.entr(probs).sum()
    if rule == CONDITIONAL:
        return float(p - (parameters[BETA] - parameters[ALPHA] * entropy))
    if rule == FLY:
        top = probs.topk(min(3, len(probs))).values
        return float(torch.special.entr(top).sum() - parameters[THRESHOLD])
    if rule == BUDGET:
        regret = float(probs.max().log() - p.log())
        kl = binary_kl(max(uniform, float(p)), min(float(p), 1.0))
        return min(regret - float(parameters[CAP]), kl - float(parameters[KAPPA]), key=abs)
    return INF
