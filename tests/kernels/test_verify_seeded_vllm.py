"""verify_seeded, strict, against vLLM's own V2 `rejection_sample`: both interpreted, on the same inputs."""

import pytest
import torch

from aasd_testing.seeded_batches import random_batch
from vllm_aasd.kernels.verify.policies import STRICT
from vllm_aasd.kernels.verify.seeded import SeededBatch

OP = "vllm_aasd.kernels.verify.seeded:verify_seeded"
STOCK = "aasd_testing.stock_v2:rejection_sample"


def compare(interpreter, arguments):
    """Assert that both emit the same tokens; return how many requests emitted how many."""
    arguments["policies"].rule.fill_(STRICT)
    given = {name: value for name, value in arguments.items() if name not in ("policies", "stop_token_ids")}
    sampled, num_sampled = interpreter.call(STOCK, draft_logits=None, **given)
    ours = interpreter.call(OP, SeededBatch(**arguments))
    assert ours.num_sampled.tolist() == num_sampled.tolist()
    assert ours.num_sampled.dtype == num_sampled.dtype and ours.sampled.dtype == sampled.dtype
    for mine, theirs, count in zip(ours.sampled, sampled, num_sampled.tolist(), strict=True):
        assert mine[:count].tolist() == theirs[:count].tolist()
        assert (mine[count:] == -1).all()
    assert not ours.relaxed.any() and not ours.regret.any()
    return num_sampled.bincount()


@pytest.mark.parametrize(
    ("vocab_size", "counts", "dtype"),
    [
        (2, [2, 1, 3, 3, 2, 3], torch.float32),
        (111, [4, 1, 4, 4, 2, 4, 3, 4, 4, 4], torch.float32),
        (5000, [9, 1, 9, 5, 9], torch.bfloat16),
        (17000, [3, 3, 3], torch.float32),
        pytest.param(151936, [4, 4, 4, 1, 4], torch.bfloat16, marks=pytest.mark.long),
        pytest.param(151936, [4, 4, 4, 1, 4], torch.float32, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_strict_emits_vllms_tokens(interpreter, vocab_size, counts, dtype, seed):
    """Greedy and sampled requests, ties, masked and one-hot rows, placeholder drafts. No NaN rows, of which
    vLLM makes something else, and no rows of nothing but -inf."""
    compare(interpreter, random_batch(vocab_size, counts, dtype, seed, odd_rows=False))


def test_many_seeds_accept_and_reject_alike(interpreter):
    """160 sampled requests over nearly even rows, so that u decides: all three lengths occur often."""
    arguments = random_batch(12, [3] * 160, torch.float32, seed=5, odd_rows=False)
    g = torch.Generator().manual_seed(6)
    arguments["target_logits"] = torch.randn(480, 12, generator=g)
    arguments["draft_sampled"] = arguments["target_logits"].argmax(-1).roll(1).int()
    arguments["temperature"].fill_(1.0)
    assert (compare(interpreter, arguments)[1:] > 12).all()


def test_greedy_takes_vllms_choice_among_ties(interpreter):
    arguments = random_batch(9000, [3] * 4, torch.bfloat16, seed=7, odd_rows=False)
    arguments["target_logits"] = torch.zeros(12, 9000, dtype=torch.bfloat16)
    arguments["target_logits"][:, [8191, 8192, 8999]] = 1.0
    arguments["draft_sampled"] = torch.tensor([0, 8191, 8192] * 4, dtype=torch.int32)
    arguments["temperature"].zero_()
    compare(interpreter, arguments)
