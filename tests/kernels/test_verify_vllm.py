"""The verify ops, strict, against vLLM's own `rejection_sample`, which they replace, on the same inputs."""

from types import SimpleNamespace

import pytest
import torch
from llvmlite.binding import ffi as llvmlite_ffi
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample import rejection_sampler as stock

from vllm_aasd.engine.v1.rejection_sampler import _random_numbers
from vllm_aasd.gpu_check import verify_inputs
from vllm_aasd.gpu_check.verify_inputs import strict
from vllm_aasd.kernels.verify import VerifyBatch, verify
from vllm_aasd.kernels.verify.policies import STRICT
from vllm_aasd.kernels.verify.seeded import SeededBatch


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels():
    """Register vLLM's CPU versions of its Triton kernels, as its worker does.

    vLLM looks through the `__dict__` of every attribute of every module, and llvmlite's library handle
    answers any attribute, `__dict__` included, with a function. An entry in its table gives vLLM an empty
    dict instead.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llvmlite_ffi.lib._fntab, "__dict__", {})
        CpuPlatform.register_triton_kernel_overrides()


def generators(batch_size):
    return {i: torch.Generator().manual_seed(100 + i) for i in range(batch_size)}


def random_batch(vocab_size, counts, seed):
    g = torch.Generator().manual_seed(seed)
    n = sum(counts)
    logits = torch.randn(n, vocab_size, generator=g) * 2
    likely = torch.randint(0, vocab_size, (n, 3), generator=g)
    logits.scatter_(1, likely, 10 + torch.randn(n, 3, generator=g))
    logits[:, vocab_size // 2] = -torch.inf
    tied = torch.rand(n, generator=g) < 0.2
    logits[tied, likely[tied, 0]] = logits[tied].amax(-1)
    pick = torch.rand(n, generator=g)
    drafts = torch.where(pick < 0.6, logits.argmax(-1), likely[:, 0])
    drafts[pick > 0.95] = -1
    bonus = torch.randint(0, vocab_size, (len(counts), 1), generator=g)
    return drafts.int(), torch.tensor(counts).cumsum(0).int(), logits, bonus


@pytest.mark.parametrize("mode", ["greedy", "sampled", "mixed"])
@pytest.mark.parametrize("vocab_size", [2, 111, 32000])
def test_strict_equals_vllm(vocab_size, mode):
    counts = [3, 0, 8, 1, 5, 8, 2]
    accepted = emitted = 0
    for seed in range(10):
        drafts, cu, logits, bonus = random_batch(vocab_size, counts, seed)
        temperature = torch.ones(len(counts)) * (mode != "greedy")
        if mode == "mixed":
            temperature[::2] = 0
        metadata = SimpleNamespace(
            all_greedy=mode == "greedy",
            all_random=mode == "sampled",
            temperature=temperature,
            generators=generators(len(counts)),
        )
        expected = stock.rejection_sample(drafts, counts, 8, cu, None, logits.clone(), bonus, metadata)
        no_stops = torch.full((len(counts), 1), -1, dtype=torch.int32)
        batch = VerifyBatch(drafts, cu, 8, logits, bonus, temperature == 0, strict(len(counts)), no_stops)
        random = _random_numbers(counts, logits, generators(len(counts)))
        assert torch.equal(verify(batch._replace(**random)).sampled, expected)
        emitted += int((expected >= 0).sum())
        accepted += int((expected >= 0).sum()) - len(counts)
    assert 0 < accepted < 10 * sum(counts), "both outcomes must occur for the comparison to mean anything"


def compare_seeded(interpreter, arguments):
    """Assert that both emit the same tokens; return how many requests emitted how many."""
    arguments["policies"].rule.fill_(STRICT)
    arguments["num_drafts"].fill_(127)
    ours = ("policies", "stop_token_ids", "num_drafts", "survival", "totals")
    given = {name: value for name, value in arguments.items() if name not in ours}
    sampled, num_sampled = interpreter.call("aasd_testing.stock_v2:rejection_sample", draft_logits=None, **given)
    ours = interpreter.call("vllm_aasd.kernels.verify.seeded:verify_seeded", SeededBatch(**arguments))
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
def test_seeded_strict_equals_vllm(interpreter, vocab_size, counts, dtype, seed):
    """Greedy and sampled requests, ties, masked and one-hot rows, placeholder drafts. No NaN rows, of which
    vLLM makes something else, and no rows of nothing but -inf."""
    compare_seeded(interpreter, verify_inputs.random_batch(vocab_size, counts, dtype, seed, odd_rows=False))


def test_many_seeds_accept_and_reject_alike(interpreter):
    """160 sampled requests over nearly even rows, so that u decides: all three lengths occur often."""
    arguments = verify_inputs.random_batch(12, [3] * 160, torch.float32, seed=5, odd_rows=False)
    g = torch.Generator().manual_seed(6)
    arguments["target_logits"] = torch.randn(480, 12, generator=g)
    arguments["draft_sampled"] = arguments["target_logits"].argmax(-1).roll(1).int()
    arguments["temperature"].fill_(1.0)
    assert (compare_seeded(interpreter, arguments)[1:] > 12).all()


def test_greedy_takes_vllms_choice_among_ties(interpreter):
    arguments = verify_inputs.random_batch(9000, [3] * 4, torch.bfloat16, seed=7, odd_rows=False)
    arguments["target_logits"] = torch.zeros(12, 9000, dtype=torch.bfloat16)
    arguments["target_logits"][:, [8191, 8192, 8999]] = 1.0
    arguments["draft_sampled"] = torch.tensor([0, 8191, 8192] * 4, dtype=torch.int32)
    arguments["temperature"].zero_()
    compare_seeded(interpreter, arguments)
