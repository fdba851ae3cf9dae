"""The sweeps over a row that the CPU kernels share, against float64."""

import numpy as np
import pytest
import torch

from vllm_aasd.kernels.common.rows_cpu import exp_nonpositive, flat_view, row_max, softmax_stats

# Float32 weights, each good to a few 1e-7, summed in blocks of 2048 and the blocks in float64.
LOG_SUM_TOLERANCE = 1e-6
ENTROPY_TOLERANCE = 5e-6
# The exponent is rounded to float32 before 2**f is taken, so the error grows with |x|: half an ulp of 126.
EXP_TOLERANCE = 6e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 111, 2048, 2049, 32000, 151936])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "masked first"])
def test_softmax_stats(vocab_size, dtype, order):
    g = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(3, vocab_size, generator=g) * torch.tensor([[0.1], [3.0], [8.0]])).to(dtype)
    if order in ("rising", "falling"):
        logits = logits.sort(dim=-1, descending=order == "falling").values
    elif order == "masked first":
        logits[:, : vocab_size // 2] = -torch.inf
    exact = logits.double()
    entropy = torch.special.entr(exact.softmax(-1)).sum(-1)
    flat, stride = flat_view(logits)
    for i in range(3):
        row = flat[i * stride : i * stride + vocab_size]
        maximum, argmax, s, t = softmax_stats(row)
        assert (maximum, argmax) == row_max(row) == (exact[i].max(), logits[i].float().argmax())
        assert maximum + np.log(s) == pytest.approx(float(exact[i].logsumexp(-1)), abs=LOG_SUM_TOLERANCE)
        assert np.log(s) - t / s == pytest.approx(float(entropy[i]), abs=ENTROPY_TOLERANCE)


def test_exp_nonpositive():
    x = np.concatenate([-np.geomspace(1e-6, 87.3, 2000), [0.0, -0.0]]).astype(np.float32)
    actual = np.array([exp_nonpositive(value) for value in x])
    np.testing.assert_allclose(actual, np.exp(x.astype(np.float64)), rtol=EXP_TOLERANCE)
    near = np.abs(x) < 1
    np.testing.assert_allclose(actual[near], np.exp(x[near].astype(np.float64)), rtol=2e-7)
    assert exp_nonpositive(np.float32(0.0)) == 1.0
    for value in (-87.4, -1e30, -np.inf):
        assert exp_nonpositive(np.float32(value)) == 0.0


def test_flat_view_follows_the_rows():
    storage = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    view = storage[1::2, 3:7]
    flat, stride = flat_view(view)
    rows = [flat[i * stride : i * stride + 4].tolist() for i in range(2)]
    assert rows == view.tolist()
    assert flat_view(view[:0])[0].size == 0
    assert flat_view(view[:1].bfloat16())[0].dtype == np.int16
    assert flat_view(view[:1].half())[0].dtype == np.uint16
