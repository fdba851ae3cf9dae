"""verify and sample_recovered_tokens against vLLM's own `rejection_sample`, which they replace on the V1 runner."""

from types import SimpleNamespace

import pytest
import torch
from llvmlite.binding import ffi as llvmlite_ffi
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample import rejection_sampler as stock

from aasd_testing.policy_tensors import strict
from vllm_aasd.kernels.verify import verify
from vllm_aasd.kernels.verify.recovered import sample_recovered_tokens


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


def ours(drafts, cu, max_spec_len, logits, bonus, temperature, counts):
    """Run verify and sample_recovered_tokens with the random numbers that vLLM draws from the same generators."""
    batch_size = len(counts)
    seeded = generators(batch_size)
    uniform = stock.generate_uniform_probs(len(drafts), counts, seeded, logits.device)
    result = verify(
        drafts, cu, max_spec_len, logits, bonus, temperature == 0, uniform,
        strict(batch_size),
        torch.full((batch_size, 1), -1, dtype=torch.int32),
    )  # fmt: skip
    output = result.output_token_ids
    for i in range(batch_size):
        if temperature[i] != 0 and result.num_accepted[i] < counts[i]:
            noise = torch.empty(1, logits.shape[1]).exponential_(generator=seeded[i])
            row = cu[i : i + 1].long() - counts[i] + result.num_accepted[i]
            output[i, result.num_accepted[i]] = sample_recovered_tokens(logits, row, drafts[row], noise.reciprocal())
    return output


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
        actual = ours(drafts, cu, 8, logits, bonus, temperature, counts)
        assert torch.equal(actual, expected)
        emitted += int((expected >= 0).sum())
        accepted += int((expected >= 0).sum()) - len(counts)
    assert 0 < accepted < 10 * sum(counts), "both outcomes must occur for the comparison to mean anything"
