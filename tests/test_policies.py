"""Verification policies: their ranges, and the tensors that the verify op gets from them."""

import dataclasses

import pytest
import torch

from vllm_aasd.kernels.verify import verify
from vllm_aasd.verification.batch import PolicyBatch
from vllm_aasd.verification.conditional import ConditionalVerification
from vllm_aasd.verification.strict import StrictVerification

STRICT = StrictVerification()
VALID = {"alpha": 0.1, "beta": 0.5, "floor": 0.3}
LOOSE = ConditionalVerification(alpha=0.25, beta=0.75, floor=0.125)
LOOSE_SAMPLED = ConditionalVerification(alpha=0.25, beta=0.75, floor=0.125, sampled=True)


def greedy(*flags):
    return torch.tensor(flags)


@pytest.mark.parametrize(
    ("parameter", "low", "high"), [("alpha", 0.0, 10.0), ("beta", 0.0, 2.0), ("floor", 1e-4, 1.0)]
)
def test_conditional_parameters_keep_to_their_ranges(parameter, low, high):
    for value in (low, high):
        assert getattr(ConditionalVerification(**{**VALID, parameter: value}), parameter) == value
    for value in (low - 1e-6, high + 1e-6, float("nan")):
        with pytest.raises(ValueError, match=f"^{parameter} is .*, must lie in"):
            ConditionalVerification(**{**VALID, parameter: value})


def test_policies_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LOOSE.alpha = 0.5


def test_rows_follow_the_batchs_order():
    batch = PolicyBatch(4, "cpu")
    policies, stop_token_ids = batch.fill(
        [STRICT, LOOSE, LOOSE], [[2], [], [3, 4]], greedy(True, True, False)
    )
    assert policies.relaxed.tolist() == [False, True, False], "sampled requests stay strict unless asked"
    assert policies.alpha[1:].tolist() == [0.25, 0.25]
    assert policies.beta[1:].tolist() == [0.75, 0.75]
    assert policies.floor[1:].tolist() == [0.125, 0.125]
    assert [[t for t in row if t >= 0] for row in stop_token_ids.tolist()] == [[2], [], [3, 4]]
    assert stop_token_ids.dtype == torch.int32 and stop_token_ids.is_contiguous()


def test_sampled_requests_are_relaxed_where_the_policy_says_so():
    policies, _ = PolicyBatch(2, "cpu").fill([LOOSE_SAMPLED, LOOSE_SAMPLED], [[], []], greedy(True, False))
    assert policies.relaxed.tolist() == [True, True]


def test_moved_and_replaced_requests_leave_nothing_behind():
    batch = PolicyBatch(3, "cpu")
    first, second = [7, 8], [9]
    batch.fill([LOOSE, STRICT, LOOSE_SAMPLED], [first, second, []], greedy(True, True, False))
    policies, stop_token_ids = batch.fill([STRICT, LOOSE], [second, first], greedy(True, True))
    assert policies.relaxed.tolist() == [False, True] and policies.alpha.shape == (2,)
    assert [[t for t in row if t >= 0] for row in stop_token_ids.tolist()] == [[9], [7, 8]]
    policies, _ = batch.fill([STRICT, LOOSE], [second, first], greedy(False, False))
    assert policies.relaxed.tolist() == [False, False], "whether a request samples is looked at every step"


def test_either_a_new_policy_or_new_stop_tokens_are_noticed():
    batch = PolicyBatch(1, "cpu")
    stops = [7]
    batch.fill([LOOSE], [stops], greedy(True))
    assert batch.fill([STRICT], [stops], greedy(True))[0].relaxed.tolist() == [False]
    assert 8 in batch.fill([STRICT], [[8]], greedy(True))[1]


def test_no_step_allocates_parameter_memory():
    batch = PolicyBatch(3, "cpu")
    first, _ = batch.fill([LOOSE, STRICT], [[], []], greedy(True, True))
    again, stop_token_ids = batch.fill([STRICT, LOOSE, LOOSE], [[1], [], []], greedy(True, True, True))
    assert [t.data_ptr() for t in first[1:]] == [t.data_ptr() for t in again[1:]]
    unchanged = batch.fill([STRICT, LOOSE, LOOSE], [[1], [], []], greedy(True, True, True))[1]
    assert unchanged.data_ptr() == stop_token_ids.data_ptr()


def test_many_stop_tokens_widen_the_table():
    batch = PolicyBatch(2, "cpu")
    batch.fill([LOOSE, LOOSE], [[1], [2]], greedy(True, True))
    _, stop_token_ids = batch.fill([LOOSE, LOOSE], [[1], list(range(20))], greedy(True, True))
    assert [t for t in stop_token_ids[0].tolist() if t >= 0] == [1]
    assert [t for t in stop_token_ids[1].tolist() if t >= 0] == list(range(20))


def test_the_op_accepts_the_tensors_and_follows_them():
    logits = torch.log(torch.tensor([[0.5, 0.4, 0.1]])).expand(3, -1).contiguous()
    loose = ConditionalVerification(alpha=0.0, beta=0.3, floor=0.1)
    policies, stop_token_ids = PolicyBatch(8, "cpu").fill(
        [STRICT, loose, loose], [[2], [2], [1]], greedy(True, True, True)
    )
    result = verify(
        torch.tensor([1, 1, 1], dtype=torch.int32),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        1,
        logits,
        torch.tensor([9, 9, 9]),
        greedy(True, True, True),
        None,
        policies,
        stop_token_ids,
    )
    assert result.output_token_ids.tolist() == [[0, -1], [1, 9], [0, -1]]


def test_bad_batches_are_named():
    batch = PolicyBatch(1, "cpu")
    with pytest.raises(ValueError, match="^policies has 2 requests, must be at most 1"):
        batch.fill([STRICT, STRICT], [[], []], greedy(True, True))
    with pytest.raises(ValueError, match="^stop_token_ids has 0 requests"):
        batch.fill([STRICT], [], greedy(True))
    with pytest.raises(ValueError, match="^max_num_reqs is 0"):
        PolicyBatch(0, "cpu")
