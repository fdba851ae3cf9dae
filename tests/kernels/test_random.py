"""The counter-based random numbers: Triton functions, reference and vLLM's own, bit for bit."""

import numpy as np
import pytest
import torch

from vllm_aasd.kernels.verify.random_reference import row_uniform, token_gumbel

SEEDS = [(0, 0), (1, 17), (-5, 4000), (2**62 + 12345, 2**31 + 5), (2**63 - 1, 2**33 + 1)]


@pytest.mark.parametrize(("seed", "position"), SEEDS)
def test_numbers_are_vllms(interpreter, seed, position):
    ids = torch.cat([torch.arange(448), torch.arange(262080, 262144)])
    ours = interpreter.call("aasd_testing.stock_v2:numbers", seed, position, ids, True)
    stock = interpreter.call("aasd_testing.stock_v2:numbers", seed, position, ids, False)
    assert torch.equal(ours, stock)
    assert ours.isfinite().all() and len(ours[0].unique()) > 500 and len(ours[1].unique()) > 500
    reference = np.array([row_uniform(seed, position + i) for i in range(len(ids))])
    assert np.array_equal(reference, ours[0].numpy())
    assert np.array_equal(token_gumbel(seed, position, 262144)[ids.numpy()], ours[1].numpy())


def test_numbers_have_their_distributions():
    """Mean and variance of 200k Gumbel variables and of 20k uniforms, within five standard errors."""
    gumbel = token_gumbel(3, 5, 200_000).astype(np.float64)
    assert abs(gumbel.mean() - np.euler_gamma) < 5 * np.pi / 6**0.5 / 200_000**0.5
    assert abs(gumbel.var() - np.pi**2 / 6) < 5 * (np.pi**2 / 6) * (4.4 / 200_000) ** 0.5
    uniform = np.array([row_uniform(3, position) for position in range(20_000)], dtype=np.float64)
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 5 * (1 / 180 / 20_000) ** 0.5
