"""Verification policies: their ranges, and the tensors that the verify op gets from them."""

import math

import pytest
import torch

from vllm_aasd.config import Settings
from vllm_aasd.kernels.verify import VerifyBatch, verify
from vllm_aasd.kernels.verify import policies as columns
from vllm_aasd.kernels.verify.policies import NUM_PARAMETERS
from vllm_aasd.verification.rules import RULES, STRICT_POLICY, conditional
from vllm_aasd.verification.table import PolicyBatch

STRICT = STRICT_POLICY
LOOSE = conditional(0.25, 0.75, relaxes_sampling=False, collapse_guard=False)
A, B, C = "request a", "request b", "request c"


def relaxed(policies):
    return (policies.rule != columns.STRICT).tolist()


@pytest.mark.parametrize(
    ("settings", "rule", "columns_of_rule", "floor"),
    [
        (
            {"verification": "conditional", "alpha": 0.25, "beta": 0.75},
            columns.CONDITIONAL,
            {"ALPHA": 0.25, "BETA": 0.75},
            0.3,
        ),
        (
            {"verification": "fly", "fly_window": 5, "fly_threshold": 0.7},
            columns.FLY,
            {"WINDOW": 5, "THRESHOLD": 0.7},
            0.01,
        ),
        (
            {"verification": "budget", "budget_nats": 3.0},
            columns.BUDGET,
            {"NATS": 3.0, "CAP": 0.25, "PER_STEP": 2, "KAPPA": 0.02},
            0.01,
        ),
    ],
)
def test_each_setting_has_its_column(settings, rule, columns_of_rule, floor):
    policy = Settings(**settings).policy()
    assert policy.rule == rule and len(policy.parameters) == NUM_PARAMETERS
    for name, value in columns_of_rule.items():
        assert policy.parameters[getattr(columns, name)] == value
    assert policy.parameters[columns.FLOOR] == floor
    assert policy.parameters[columns.LIMIT] == 1.4 and policy.parameters[columns.COOLDOWN] == 32
    assert policy.parameters[columns.DECAY] ** 64 == pytest.approx(math.exp(-1))
    assert Settings(**settings, collapse_guard=False).policy().parameters[columns.LIMIT] == math.inf
    assert policy.relaxes(is_greedy=True) and not policy.relaxes(is_greedy=False)
    assert Settings(**settings, relax_sampling=True).policy().relaxes(is_greedy=False)


def test_every_rule_has_a_policy():
    numbers = [Settings(verification=rule).policy().rule for rule in RULES]
    assert len(set(numbers)) == len(RULES) and Settings(verification="strict").policy() == STRICT
    assert not STRICT.relaxes(is_greedy=True)


def test_rows_follow_the_batchs_order_and_leave_nothing_behind():
    batch = PolicyBatch(3)
    first, second = [7, 8], [9]
    policies, stops = batch.fill([A, B, C], [LOOSE, STRICT, LOOSE], [first, second, []])
    assert relaxed(policies) == [True, False, True]
    for column, value in ((columns.ALPHA, 0.25), (columns.BETA, 0.75), (columns.FLOOR, 0.3)):
        assert policies.parameters[::2, column].tolist() == pytest.approx([value, value])
    assert policies.state_rows[1] == -1, "strict requests have no state"
    places = [tensor.data_ptr() for tensor in (*policies, stops)]
    policies, stops = batch.fill([B, A], [STRICT, LOOSE], [second, first])
    assert relaxed(policies) == [False, True] and policies.parameters.shape == (2, NUM_PARAMETERS)
    assert [[t for t in row if t >= 0] for row in stops.tolist()] == [[9], [7, 8]]
    assert [tensor.data_ptr() for tensor in (*policies, stops)] == places, "no step allocates memory"


def test_either_a_new_policy_or_new_stop_tokens_are_noticed():
    batch = PolicyBatch(1)
    stops = [7]
    batch.fill([A], [LOOSE], [stops])
    assert relaxed(batch.fill([A], [STRICT], [stops])[0]) == [False]
    assert 8 in batch.fill([A], [STRICT], [[8]])[1]


def test_the_table_of_stop_tokens_has_one_width():
    batch = PolicyBatch(2)
    most = list(range(columns.MAX_STOP_TOKEN_IDS))
    _, stop_token_ids = batch.fill([A, B], [LOOSE, LOOSE], [[1], most])
    assert stop_token_ids.shape == (2, columns.MAX_STOP_TOKEN_IDS) and stop_token_ids.dtype == torch.int32
    assert [t for t in stop_token_ids[0].tolist() if t >= 0] == [1]
    assert stop_token_ids[1].tolist() == most
    with pytest.raises(ValueError, match=r"^stop_token_ids\[1\] has 65 ids, must be at most 64"):
        batch.fill([A, B], [LOOSE, LOOSE], [[1], [*most, 64]])


def test_the_op_accepts_the_tensors_and_follows_them():
    logits = torch.log(torch.tensor([[0.5, 0.4, 0.1]])).expand(3, -1).contiguous()
    loose = conditional(0.0, 0.3, relaxes_sampling=False, collapse_guard=False)
    policies, stop_token_ids = PolicyBatch(8).fill([A, B, C], [STRICT, loose, loose], [[2], [2], [1]])
    drafts, cu = torch.tensor([[1, 1, 1], [1, 2, 3]], dtype=torch.int32)
    bonus, is_greedy = torch.tensor([9, 9, 9]), torch.ones(3, dtype=torch.bool)
    result = verify(VerifyBatch(drafts, cu, 1, logits, bonus, is_greedy, policies, stop_token_ids))
    assert result.sampled.tolist() == [[0, -1], [1, 9], [0, -1]]


def test_the_state_follows_the_request_until_it_ends():
    batch = PolicyBatch(2)

    def states(*req_ids):
        policies = batch.fill(req_ids, [LOOSE] * len(req_ids), [[]] * len(req_ids))[0]
        return policies.state[policies.state_rows.long(), 0].tolist(), policies

    _, policies = states(A, B)
    policies.state[policies.state_rows[0]] = 7.0
    assert states(B, A)[0] == [0, 7], "it moves"
    assert states(C, B)[0] == [0, 0], "is preempted while others run, of whom there are now more than rows"
    assert states(A)[0] == [7], "and comes back"
    batch.forget([A, "never seen"])
    assert states(A)[0] == [0], "an id that comes again is another request"
