"""Counting what became of drafts: the compiled loop against what is to be counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_aasd.gpu_check.inputs import COUNT_WIDTH, count_step
from vllm_aasd.kernels import count
from vllm_aasd.kernels.count import reference
from vllm_aasd.kernels.verify import VerifyOutput


def totals(op, *step):
    counted = torch.full((count.SIZE,), 0.5, dtype=torch.float64)
    op(counted, *step)
    return counted - 0.5


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_reqs=st.integers(0, 40),
    first_draft=st.sampled_from([0, 1]),
    width=st.sampled_from([COUNT_WIDTH, 2]),
)
def test_the_compiled_loop_counts_what_is_specified(seed, num_reqs, first_draft, width):
    *step, survival, output = count_step(seed, num_reqs, first_draft)
    step += survival[:, :width].contiguous(), output
    torch.testing.assert_close(totals(count.count_drafts, *step), totals(reference.count_drafts, *step))


@pytest.mark.parametrize("width", [2, 3])
def test_by_hand(width):
    """Two requests: one without drafts, one with three draft tokens, of which two are accepted, and a filler."""
    step = (
        torch.tensor([5, 6, 7, -1]),
        torch.tensor([0, 0, 4]),
        0,
        torch.tensor([0, 1]),
        torch.tensor([[0.9, 0.9, 0.9], [1.0, 0.45, 0.4]])[:, :width],
        VerifyOutput(
            None,
            torch.tensor([1, 3]),
            torch.tensor([False, True, True, True]),
            torch.tensor([0.0, 0.25, 0.5, 0.5]),
            torch.tensor([False, True]),
            torch.tensor([True, True]),
        ),
    )
    want = torch.zeros(count.SIZE, dtype=torch.float64)
    want[count.RELAXED], want[count.REGRET], want[count.EXHAUSTED], want[count.GUARDED] = 1, 0.25, 1, 2
    want[count.SURVIVAL_TOKENS + 9] = want[count.SURVIVAL_PROMISED + 9] = want[count.SURVIVAL_ACCEPTED + 9] = 1
    want[count.SURVIVAL_TOKENS + 4] = width - 1
    want[count.SURVIVAL_PROMISED + 4] = 0.45 if width == 2 else 0.85
    want[count.SURVIVAL_ACCEPTED + 4] = 1
    torch.testing.assert_close(totals(count.count_drafts, *step), want)


def test_a_wrong_shape_is_named():
    step = list(count_step(0, 3, 0))
    step[1] = step[1][:-1]
    with pytest.raises(ValueError, match="cu_num_rows has shape"):
        count.count_drafts(torch.zeros(count.SIZE, dtype=torch.float64), *step)
