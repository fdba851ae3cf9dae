"""The rules, guards, budgets and odd rows, by cases worked out by hand, on references, CPU and Triton paths."""

import math

import pytest
import torch

from aasd_testing import verify_paths
from vllm_aasd.gpu_check.verify_inputs import INF, NAN, batch
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

# Entropy 1.34 nats, of the three likeliest 1.05; token 0 is the argmax.
ROW = torch.log(torch.tensor([0.35, 0.30, 0.20, 0.15]))
# Entropy 0.15 nats: the target is certain.
CERTAIN = torch.log(torch.tensor([0.97, 0.01, 0.01, 0.01]))
REGRET = math.log(0.35 / 0.30)
LOOSE = {"rules": [CONDITIONAL], "alpha": [0.0], "beta": [0.1], "floor": [0.1]}


@pytest.fixture(params=verify_paths.V1 + verify_paths.V2)
def path(request):
    """Verifies a batch of the seeded op by one of the implementations; adds what the tests look at."""
    interpreter = request.getfixturevalue("interpreter") if request.param == "triton" else None

    def run(arguments, **given):
        result = verify_paths.run(request.param, arguments, interpreter, **given)
        result.tokens = verify_paths.tokens(result)
        result.accepted = (result.num_sampled - 1).tolist()
        result.relaxed_rows = verify_paths.relaxed_rows(result, arguments)
        result.exhausted, result.guarded = result.exhausted.tolist(), result.guarded.tolist()
        return result

    run.is_v1 = request.param in verify_paths.V1
    return run


def one(rows, drafts, **given):
    """A batch of one greedy request: logits of its draft rows, and its drafts; its bonus row is the last one again."""
    rows = torch.stack([torch.as_tensor(row) for row in rows])
    return batch([torch.cat([rows, rows[-1:]])], [drafts], **given)


def test_greedy_takes_the_lowest_of_tied_maxima_and_zero_equals_minus_zero(path):
    tied = torch.zeros(5000)
    tied[[2049, 4100]] = 1.0
    result = path(batch([tied.expand(2, -1)] * 3, [[2049], [4100], [-1]]))
    assert result.tokens == [[2049, 2049], [2049], [2049]]
    assert path(batch([[[-0.0, 0.0, -1.0]] * 2] * 2, [[0], [1]])).tokens == [[0, 0], [0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row", [[NAN] * 4, [1.0, NAN, 2.0, 3.0], [1.0, 2.0, -NAN, 3.0], [-INF] * 4, [0.0, INF, 0.0, INF]]
)
def test_a_row_without_softmax_does_no_harm(path, temperature, row):
    """Such a row for every draft token, and a good one beside it."""
    good = [0.0, 5.0, 1.0, 2.0]
    drafts = [[0], [1], [2], [3], [-1], [1]]
    arguments = batch(
        [[row, row]] * 5 + [[good, good]], drafts, temperature=[temperature] * 6, relaxed=[True] * 6,
        beta=[0.0] * 6, floor=[1e-4] * 6, seed=range(6),
    )  # fmt: skip
    result = path(arguments)
    argmax = int(torch.tensor(row).argmax())
    for (draft,), tokens in zip(drafts[:5], result.tokens, strict=False):
        accepted = temperature == 0 and draft == argmax
        assert tokens == ([argmax, argmax] if accepted else tokens[:1])
        assert 0 <= tokens[0] < 4
        if temperature == 0 or path.is_v1 or draft not in (argmax, -1):
            assert tokens[0] == argmax
    assert result.tokens[5][0] == 1
    assert not result.relaxed[:10].any() and not result.regret[:10].any()


@pytest.mark.parametrize("relaxed", [True, False])
def test_a_token_without_probability_is_rejected_and_never_drawn(path, relaxed):
    """Also for a uniform of 0, which the V1 op can have."""
    n = 20
    rows = [[[0.0, -INF, -200.0, 1.0]] * 2] * n
    drafts = [[(1, 2, -1, 4, 2**31 - 1)[i % 5]] for i in range(n)]
    arguments = batch(rows, drafts, temperature=[1.0] * n, seed=range(n), relaxed=[relaxed] * n, beta=[0.0] * n,
                      floor=[0.0] * n)  # fmt: skip
    result = path(arguments, uniform_probs=torch.zeros(n, dtype=torch.float64))
    assert result.accepted == [0] * n
    assert {emitted for (emitted,) in result.tokens} == {0, 3}
    arguments["temperature"].zero_()
    assert path(arguments).tokens == [[3]] * n


def test_stop_token_guard_and_bars(path):
    row = ROW.tolist()
    half = [0.0, 0.0, -INF, -INF]
    cases = [  # row, draft, stops, alpha, beta, floor, accepted
        (row, 1, [], 0.0, 0.1, 0.1, True),
        (row, 1, [2], 0.0, 0.1, 0.1, True),
        (row, 1, [1], 0.0, 0.1, 0.1, False),
        (row, 2, [1], 0.0, 0.1, 0.1, False),
        (row, 1, [2, 3], 0.0, 0.1, 0.1, False),
        (row, 0, [0], 0.0, 0.1, 0.1, True),
        # However long the list; ids outside the vocabulary are ignored.
        (row, 1, [7, 8, 9, 10, 2], 0.0, 0.1, 0.1, True),
        (row, 1, [7, 8, 9, 10, 1], 0.0, 0.1, 0.1, False),
        (row, 1, [7, 8, 9, 10, 0], 0.0, 0.1, 0.1, False),
        (row, 1, [], 0.0, 0.1, 0.31, False),
        (row, 1, [], 0.0, 0.31, 0.1, False),
        # The entropy is 1.34 nats.
        (row, 1, [], 0.2, 0.55, 0.1, True),
        (row, 1, [], 0.2, 0.58, 0.1, False),
        # A probability equal to the bar passes, one equal to that of stopping doesn't.
        (half, 1, [], 0.0, 0.0, 0.5, True),
        (half, 1, [], 0.0, 0.5, 0.1, True),
        (half, 1, [], 0.0, 0.501, 0.1, False),
        (half, 1, [0], 0.0, 0.1, 0.1, False),
    ]
    rows, drafts, stops, alpha, beta, floor, accepted = zip(*cases, strict=True)
    result = path(
        batch([[r, r] for r in rows], [[d] for d in drafts], relaxed=[True] * len(cases), stops=stops,
              alpha=alpha, beta=beta, floor=floor)
    )  # fmt: skip
    assert result.accepted == list(accepted)
    strict = [draft == 0 for draft in drafts]
    assert result.relaxed[::2].tolist() == [a and not s for a, s in zip(accepted, strict, strict=True)]


def test_a_probability_equal_to_u_passes_on_v1(path):
    """V2 compares logarithms, as vLLM does."""
    arguments = one([[0.0, 0.0]], [1], temperature=[1.0])
    if path.is_v1:
        assert path(arguments, uniform_probs=torch.tensor([0.5]).double()).accepted == [1]
        assert path(arguments, uniform_probs=torch.tensor([0.5001]).double()).accepted == [0]


def test_the_entropy_is_that_of_the_whole_row(path):
    """A token of `ROW` in each of three blocks: 1.34 nats, of which each block sees a part."""
    row = torch.full((2, 5000), -INF)
    row[:, [10, 2100, 3000, 4500]] = ROW
    result = path(
        batch([row, row], [[2100], [2100]], relaxed=[True] * 2, alpha=[0.2] * 2, beta=[0.55, 0.58], floor=[0.1] * 2)
    )
    assert result.accepted == [1, 0]


def test_regret_and_relaxed_stand_only_in_the_accepted_prefix(path):
    row = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    result = path(one([row] * 4, [1, 0, 2, 1], relaxed=[True], beta=[0.25], alpha=[0.0]))
    assert result.tokens == [[1, 0, 0]] and result.relaxed_rows == [[0]]
    torch.testing.assert_close(result.regret, torch.tensor([0.5108256, 0, 0, 0, 0]), rtol=0, atol=1e-6)


def test_requests_without_drafts_emit_their_bonus_token(path):
    row = torch.tensor([[0.0, 40.0, 0.0]])
    assert path(batch([row] * 2, [[], []], temperature=[0.0, 1.0], num_speculative_steps=3)).tokens == [[1], [1]]
    if not path.is_v1:
        for rows in ([], [torch.empty(0, 7)] * 3):
            assert path(batch(rows, [[]] * len(rows), num_speculative_steps=2)).tokens == [[]] * len(rows)


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
    assert (result.accepted, result.relaxed_rows) == ([accepted], [relaxed])


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
    assert (result.accepted, result.relaxed_rows, result.exhausted) == ([3], [[0, 2]], [False])
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
    assert {True, False} == set(result.exhausted) and any(result.relaxed_rows)
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
    assert (result.accepted, result.relaxed_rows, result.guarded) == ([2], [[0, 1]], [True])
    assert result.state[0, LEVEL] == 0.75 and result.state[0, STRICT_LEFT] == 2
    result = path(arguments)
    assert (result.accepted, result.guarded) == ([0], [False])
    assert result.state[0, LEVEL] == 0.375 and result.state[0, STRICT_LEFT] == 1
    # An accepted token counts down too; the second row is free again.
    agreeing = one([ROW] * 2, [0, 1], **LOOSE, **guard)
    agreeing["policies"] = arguments["policies"]
    result = path(agreeing)
    assert (result.accepted, result.relaxed_rows) == ([2], [[1]])
    assert result.state[0, LEVEL] == (0.375 / 4 + 1) / 2 and result.state[0, STRICT_LEFT] == 0


def test_strict_requests_leave_no_trace(path):
    result = path(one([ROW] * 2, [0, 1], rules=[STRICT], level=[0.5], strict_left=[3], spent=[0.25]))
    assert result.accepted == [1]
    assert result.state[0].tolist() == [0.25, 0.5, 3.0, 0.0]
