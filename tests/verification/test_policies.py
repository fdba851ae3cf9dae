"""Verification policies: their ranges, and the tensors that the verify op gets from them."""

import math

import pytest
import torch

from vllm_aasd.config import Settings
from vllm_aasd.kernels.verify import policies as columns
from vllm_aasd.kernels.verify import verify
from vllm_aasd.kernels.verify.policies import NUM_PARAMETERS
from vllm_aasd.verification.batch import PolicyBatch
from vllm_aasd.verification.rules import RULES, STRICT_POLICY, conditional
from vllm_aasd.verification.states import RequestStates

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


def test_rows_follow_the_batchs_order():
    batch = PolicyBatch(4)
    policies, stop_token_ids = batch.fill([A, B, C], [STRICT, LOOSE, LOOSE], [[2], [], [3, 4]])
    assert relaxed(policies) == [False, True, True]
    for column, value in ((columns.ALPHA, 0.25), (columns.BETA, 0.75), (columns.FLOOR, 0.3)):
        assert policies.parameters[1:, column].tolist() == pytest.approx([value, value])
    assert [[t for t in row if t >= 0] for row in stop_token_ids.tolist()] == [[2], [], [3, 4]]
    assert stop_token_ids.dtype == torch.int32 and stop_token_ids.is_contiguous()


def test_moved_and_replaced_requests_leave_nothing_behind():
    batch = PolicyBatch(3)
    first, second = [7, 8], [9]
    batch.fill([A, B, C], [LOOSE, STRICT, LOOSE], [first, second, []])
    policies, stop_token_ids = batch.fill([B, A], [STRICT, LOOSE], [second, first])
    assert relaxed(policies) == [False, True] and policies.parameters.shape == (2, NUM_PARAMETERS)
    assert [[t for t in row if t >= 0] for row in stop_token_ids.tolist()] == [[9], [7, 8]]


def test_either_a_new_policy_or_new_stop_tokens_are_noticed():
    batch = PolicyBatch(1)
    stops = [7]
    batch.fill([A], [LOOSE], [stops])
    assert relaxed(batch.fill([A], [STRICT], [stops])[0]) == [False]
    assert 8 in batch.fill([A], [STRICT], [[8]])[1]


def test_no_step_allocates_parameter_memory():
    batch = PolicyBatch(3)
    first, _ = batch.fill([A, B], [LOOSE, STRICT], [[], []])
    again, stop_token_ids = batch.fill([B, A, C], [STRICT, LOOSE, LOOSE], [[1], [], []])
    assert [t.data_ptr() for t in first[1:]] == [t.data_ptr() for t in again[1:]]
    unchanged = batch.fill([B, A, C], [STRICT, LOOSE, LOOSE], [[1], [], []])[1]
    assert unchanged.data_ptr() == stop_token_ids.data_ptr()


def test_the_table_of_stop_tokens_has_one_width():
    batch = PolicyBatch(2)
    _, narrow = batch.fill([A, B], [LOOSE, LOOSE], [[1], []])
    most = list(range(columns.MAX_STOP_TOKEN_IDS))
    _, stop_token_ids = batch.fill([A, B], [LOOSE, LOOSE], [[1], most])
    assert narrow.shape == stop_token_ids.shape == (2, columns.MAX_STOP_TOKEN_IDS)
    assert [t for t in stop_token_ids[0].tolist() if t >= 0] == [1]
    assert stop_token_ids[1].tolist() == most
    with pytest.raises(ValueError, match=r"^stop_token_ids\[1\] has 65 ids, must be at most 64"):
        batch.fill([A, B], [LOOSE, LOOSE], [[1], [*most, 64]])


def test_the_op_accepts_the_tensors_and_follows_them():
    logits = torch.log(torch.tensor([[0.5, 0.4, 0.1]])).expand(3, -1).contiguous()
    loose = conditional(0.0, 0.3, relaxes_sampling=False, collapse_guard=False)
    policies, stop_token_ids = PolicyBatch(8).fill([A, B, C], [STRICT, loose, loose], [[2], [2], [1]])
    result = verify(
        torch.tensor([1, 1, 1], dtype=torch.int32),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        1,
        logits,
        torch.tensor([9, 9, 9]),
        torch.ones(3, dtype=torch.bool),
        None,
        policies,
        stop_token_ids,
    )
    assert result.output_token_ids.tolist() == [[0, -1], [1, 9], [0, -1]]


def test_bad_batches_are_named():
    batch = PolicyBatch(1)
    with pytest.raises(ValueError, match=r"^policies has 2 requests, must be at most 1"):
        batch.fill([A, B], [STRICT, STRICT], [[], []])
    with pytest.raises(ValueError, match=r"^req_ids has 1 requests and stop_token_ids 0, expected 1"):
        batch.fill([A], [STRICT], [])
    with pytest.raises(ValueError, match=r"^max_num_reqs is 0"):
        PolicyBatch(0)


def test_what_is_remembered_follows_the_request_until_it_ends():
    batch = PolicyBatch(2)

    def fill(*req_ids):
        return batch.fill(req_ids, [LOOSE] * len(req_ids), [[]] * len(req_ids))[0]

    policies = fill(A, B)
    policies.state[policies.state_rows[0]] = 7.0
    # It moves, is preempted while others run, and comes back.
    policies = fill(B, A)
    assert (
        policies.state[policies.state_rows[1], columns.SPENT] == 7 and policies.state[policies.state_rows[0]].sum() == 0
    )
    policies = fill(C, B)
    assert not policies.state[policies.state_rows.long()].any()
    policies = fill(A)
    assert (policies.state[policies.state_rows[0]] == 7).all()
    batch.forget([A, "never seen"])
    assert not fill(A).state[policies.state_rows[0]].any(), "an id that comes again is another request"


def test_strict_requests_are_not_remembered():
    policies, _ = PolicyBatch(2).fill([A, B], [STRICT, LOOSE], [[], []])
    assert policies.state_rows[0] == -1 and policies.state_rows[1] >= 0


def test_rows_of_the_state_are_zeros_for_a_new_owner_and_grow_with_the_preempted():
    states = RequestStates(2, "cpu")
    rows = [states.row_of(req_id) for req_id in (A, B)]
    states.state[rows] = 1.0
    third = states.row_of(C)
    assert len({*rows, third}) == 3 and states.state[third].sum() == 0
    assert (states.state[rows] == 1).all(), "growing keeps what is there"
    states.forget([A])
    assert states.row_of("another") == rows[0] and states.state[rows[0]].sum() == 0
    assert states.row_of(B) == rows[1]
