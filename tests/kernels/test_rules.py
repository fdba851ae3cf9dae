"""The verification rules, guards and budgets, by cases worked out by hand, on references, CPU and Triton paths."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from aasd_testing.seeded_batches import batch
from vllm_aasd.kernels.verify import cpu as verify_cpu
from vllm_aasd.kernels.verify import reference as verify_reference
from vllm_aasd.kernels.verify import seeded_reference as verify_seeded_reference
from vllm_aasd.kernels.verify.policies import (
    BUDGET,
    CONDITIONAL,
    EXHAUSTED,
    FLY,
    LEVEL,
    SPENT,
    STRICT,
    STRICT_LEFT,
)
from vllm_aasd.kernels.verify.random_reference import row_uniform
from vllm_aasd.kernels.verify.seeded import SeededBatch

INF = float("inf")
# Entropy 1.34 nats, of the three likeliest 1.05; token 0 is the argmax.
ROW = torch.log(torch.tensor([0.35, 0.30, 0.20, 0.15]))
# Entropy 0.15 nats: the target is certain.
CERTAIN = torch.log(torch.tensor([0.97, 0.01, 0.01, 0.01]))
REGRET = math.log(0.35 / 0.30)
LOOSE = {"rules": [CONDITIONAL], "alpha": [0.0], "beta": [0.1], "floor": [0.1]}


def as_v1(path, arguments):
    """The V1 op on a batch of the seeded op, with its random numbers."""
    starts, ends = arguments["cu_num_logits"][:-1], arguments["cu_num_logits"][1:]
    rows = [row for start, end in zip(starts, ends, strict=True) for row in range(start, end - 1)]
    slots = arguments["idx_mapping"]
    slot_of = arguments["expanded_idx_mapping"]
    uniform = [row_uniform(int(arguments["seed"][slot_of[row]]), int(arguments["pos"][row])) for row in rows]
    policies = arguments["policies"]
    by_request = policies._replace(
        **{name: getattr(policies, name)[slots] for name in ("rule", "parameters", "state_rows")}
    )
    return path.verify(
        arguments["draft_sampled"][[row + 1 for row in rows]].int(),
        (ends - starts - 1).cumsum(0).int(),
        arguments["num_speculative_steps"],
        arguments["target_logits"][rows],
        torch.zeros(len(starts), dtype=torch.int64),
        arguments["temperature"][slots] == 0,
        torch.tensor(uniform, dtype=torch.float64),
        by_request,
        arguments["stop_token_ids"][slots],
    ), rows


@pytest.fixture(params=["triton", "seeded reference", "cpu", "reference"])
def path(request):
    """Verifies a batch of the seeded op by one of the implementations.

    Returns: num_accepted and relaxed rows per request, events, and the state by slot, which it also leaves there.
    """

    def run(arguments):
        policies, cu = arguments["policies"], arguments["cu_num_logits"].tolist()
        if request.param == "triton":
            interpreter = request.getfixturevalue("interpreter")
            result, state = interpreter.call("aasd_testing.interpreter:verify_and_state", arguments)
            policies.state.copy_(state)
        elif request.param == "seeded reference":
            result = verify_seeded_reference.verify_seeded(SeededBatch(**arguments))
        if request.param in ("triton", "seeded reference"):
            accepted, relaxed = (result.num_sampled - 1).tolist(), result.relaxed
        else:
            result, rows = as_v1(verify_cpu if request.param == "cpu" else verify_reference, arguments)
            accepted = result.num_accepted.tolist()
            relaxed = torch.zeros(cu[-1], dtype=torch.bool)
            relaxed[rows] = result.relaxed
        return SimpleNamespace(
            accepted=accepted,
            relaxed=[relaxed[a:b].nonzero()[:, 0].tolist() for a, b in itertools.pairwise(cu)],
            exhausted=result.exhausted.tolist(),
            guarded=result.guarded.tolist(),
            state=policies.state[policies.state_rows.long()],
        )

    return run


def one(rows, drafts, **given):
    """A batch of one greedy request: logits of its draft rows, and its drafts; its bonus row is the last one again."""
    rows = torch.stack([torch.as_tensor(row) for row in rows])
    return batch([torch.cat([rows, rows[-1:]])], [drafts], **given)


@pytest.mark.parametrize(
    ("rows", "drafts", "window", "threshold", "accepted", "relaxed"),
    [
        # The window holds, up to the last draft.
        ([ROW] * 3, [1, 0, 0], 2, 0.3, 3, [0]),
        # The draft ends before the window does.
        ([ROW] * 3, [1, 0, 0], 3, 0.3, 0, []),
        ([ROW] * 3, [0, 1, 0], 2, 0.3, 1, []),
        # A second mismatch in the window rejects the first retroactively.
        ([ROW] * 4, [1, 0, 1, 0], 2, 0.3, 0, []),
        ([ROW] * 3, [1, 1, 0], 1, 0.3, 0, []),
        # A mismatch after the window has a window of its own.
        ([ROW] * 4, [1, 0, 1, 0], 1, 0.3, 4, [0, 2]),
        ([ROW] * 5, [1, 0, 1, 0, 2], 1, 0.3, 4, [0, 2]),
        # The gate, over three probabilities that aren't normalized: 1.0505 nats; all four have 1.3351.
        ([ROW] * 2, [1, 0], 1, 1.049, 2, [0]),
        ([ROW] * 2, [1, 0], 1, 1.052, 0, []),
        ([CERTAIN] * 2, [1, 0], 1, 0.3, 0, []),
        # A placeholder is no agreement.
        ([ROW] * 3, [1, 0, -1], 2, 0.3, 0, []),
    ],
)
def test_fly(path, rows, drafts, window, threshold, accepted, relaxed):
    given = {"rules": [FLY], "window": [window], "threshold": [threshold], "floor": [1e-4]}
    result = path(one(rows, drafts, **given))
    assert (result.accepted, result.relaxed) == ([accepted], [relaxed])


def test_flys_gate_finds_the_three_likeliest_across_blocks(path):
    """Of blocks of 2048 that hold none, one, two or all three of them, and ties within and between blocks."""
    for places in ([5, 6, 7], [5, 2100, 2101], [2100, 5, 4200], [4200, 4201, 5], [4999, 4998, 4997]):
        for probs in ([0.4, 0.3, 0.2], [0.3, 0.3, 0.3], [0.4, 0.25, 0.25], [0.6, 0.3, 0.05]):
            row = torch.full((5000,), math.log((1 - sum(probs)) / 4997))
            row[places] = torch.log(torch.tensor(probs))
            entropy = -sum(p * math.log(p) for p in probs)
            argmax = int(row.argmax())
            draft = next(place for place in places if place != argmax)
            for threshold, accepted in ((entropy - 1e-3, 2), (entropy + 1e-3, 0)):
                given = {"rules": [FLY], "window": [1], "threshold": [threshold], "floor": [1e-4]}
                result = path(one([row, row], [draft, argmax], **given))
                assert result.accepted == [accepted], (places, probs, threshold)


def test_a_greedy_budget_caps_each_token_each_step_and_the_request(path):
    budget = {"rules": [BUDGET], "floor": [0.1], "nats": [1.0]}
    assert path(one([ROW], [1], cap=[REGRET + 1e-4], **budget)).accepted == [1]
    assert path(one([ROW], [1], cap=[REGRET - 1e-4], **budget)).accepted == [0]
    result = path(one([ROW] * 4, [1, 0, 1, 1], cap=[1.0], per_step=[2], **budget))
    assert (result.accepted, result.relaxed, result.exhausted) == ([3], [[0, 2]], [False])
    assert float(result.state[0, SPENT]) == pytest.approx(2 * REGRET, abs=1e-6)


def test_no_budget_pays_for_nothing_not_even_a_tie(path):
    tie = [0.0, 0.0, -INF, -INF]
    for nats, accepted in ((0.0, 0), (0.1, 1)):
        result = path(one([tie], [1], rules=[BUDGET], cap=[1.0], nats=[nats], floor=[0.1]))
        assert result.accepted == [accepted] and result.exhausted == [accepted == 0]


def test_a_budget_never_refills(path):
    """Three tokens' worth: paid in two steps, refused in the third, and strict ever after."""
    arguments = one([ROW] * 2, [1, 1], rules=[BUDGET], cap=[1.0], nats=[3.5 * REGRET], floor=[0.1])
    first, second, third, fourth = (path(arguments) for _ in range(4))
    assert [result.accepted for result in (first, second, third, fourth)] == [[2], [1], [0], [0]]
    assert [result.exhausted for result in (first, second, third, fourth)] == [[False], [True], [False], [False]]
    assert float(fourth.state[0, SPENT]) == pytest.approx(3 * REGRET, abs=1e-6)
    assert fourth.state[0, EXHAUSTED] == 1
    # Something smaller could have been paid.
    close = torch.log(torch.tensor([0.35, 0.345, 0.3, 0.005]))
    assert path({**arguments, "target_logits": close.repeat(3, 1)}).accepted == [0]


def test_a_sampled_budget_pays_for_every_position_that_was_open(path):
    """What comes of it, accepted or not, strictly or not: min(kappa, -log p) of each row that was reached."""
    n, kappa = 12, 0.05
    arguments = batch(
        ROW.expand(n, 4, -1), [[0, 1, 3]] * n, temperature=[1.0] * n, seed=range(n), rules=[BUDGET] * n,
        kappa=[kappa] * n, nats=[2.2 * kappa] * n, floor=[0.1] * n,
    )  # fmt: skip
    result = path(arguments)
    spent = result.state[:, SPENT]
    for req in range(n):
        reached = min(result.accepted[req] + 1, 3)
        assert float(spent[req]) == pytest.approx(min(reached, 2) * kappa, abs=1e-6)
        assert result.exhausted[req] == (reached == 3)
    assert {True, False} == set(result.exhausted) and any(result.relaxed)
    assert (path(arguments).state[:, SPENT] <= 2.2 * kappa).all()


@pytest.mark.parametrize(
    "rule",
    [
        {"rules": [CONDITIONAL], "beta": [0.0]},
        {"rules": [FLY], "window": [1], "threshold": [0.0]},
        {"rules": [BUDGET], "cap": [20.0]},
    ],
    ids=["conditional", "fly", "budget"],
)
def test_the_guards_stand_under_every_rule(path, rule):
    def is_accepted(row=ROW, **given):
        result = path(one([row, row], [1, 0], **{**rule, "floor": [0.1], **given}))
        assert result.accepted in ([2], [0])
        return result.accepted == [2]

    assert is_accepted()
    assert is_accepted(stops=[[2]])
    assert not is_accepted(stops=[[1]]), "a stop token is no relaxed acceptance"
    assert not is_accepted(stops=[[2, 3]]), "the target would rather stop"
    assert is_accepted(floor=[0.299]) and not is_accepted(floor=[0.301])
    masked = ROW.clone()
    masked[1] = -INF
    assert not is_accepted(masked, floor=[0.0]), "a token without a probability"
    assert not is_accepted(level=[0.5], limit=[1.4], decay=[0.9]), "the level is 0.45 by then"
    assert is_accepted(level=[0.5], limit=[1.5], decay=[0.9])
    assert not is_accepted(strict_left=[1])
    assert not is_accepted(exhausted=[1])
    stateless = one([ROW, ROW], [1, 0], **rule, floor=[0.1])
    stateless["policies"].state_rows.fill_(-1)
    assert path(stateless).accepted == [0], "nothing to remember by"
    unknown = one([ROW, ROW], [1, 0], rules=[5], floor=[0.1])
    assert path(unknown).accepted == [0]


def test_the_collapse_guard_engages_and_lets_go(path):
    """Level 1, 0.5 + 1, then 0.75 + 1 is too much: strict for the two tokens after the recovered one."""
    guard = {"limit": [1.6], "decay": [0.5], "cooldown": [2]}
    arguments = one([ROW] * 4, [1, 1, 1, 1], **LOOSE, **guard)
    result = path(arguments)
    assert (result.accepted, result.relaxed, result.guarded) == ([2], [[0, 1]], [True])
    assert result.state[0, LEVEL] == 0.75 and result.state[0, STRICT_LEFT] == 2
    result = path(arguments)
    assert (result.accepted, result.guarded) == ([0], [False])
    assert result.state[0, LEVEL] == 0.375 and result.state[0, STRICT_LEFT] == 1
    # An accepted token counts down too; the second row is free again.
    agreeing = one([ROW] * 2, [0, 1], **LOOSE, **guard)
    agreeing["policies"] = arguments["policies"]
    result = path(agreeing)
    assert (result.accepted, result.relaxed) == ([2], [[1]])
    assert result.state[0, LEVEL] == (0.375 / 4 + 1) / 2 and result.state[0, STRICT_LEFT] == 0


def test_strict_requests_leave_no_trace(path):
    result = path(one([ROW] * 2, [0, 1], rules=[STRICT], level=[0.5], strict_left=[3], spent=[0.25]))
    assert result.accepted == [1]
    assert result.state[0].tolist() == [0.25, 0.5, 3.0, 0.0]
