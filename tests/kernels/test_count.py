"""Counting what became of drafts: the compiled loop against what is to be counted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_aasd.kernels import count
from vllm_aasd.kernels.verify import VerifyOutput

WIDTH = 4


def batch(seed, num_reqs, first_draft, id_dtype=torch.int32):
    """A step of random drafts, some without any, some followed by fillers, with promises by slot."""
    g = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    columns = integers(0, WIDTH + 1, num_reqs)
    real = (columns - integers(0, 3, num_reqs)).clamp(min=0)
    accepted = torch.stack([integers(0, int(n) + 1, 1)[0] for n in real]) if num_reqs else columns
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (columns + first_draft).cumsum(0)])
    ids = torch.full((int(cu[-1]),), 7, dtype=id_dtype)
    relaxed = torch.rand(len(ids), generator=g) < 0.5
    for start, first, width in zip(cu.tolist(), real.tolist(), columns.tolist(), strict=False):
        ids[start + first_draft + first : start + first_draft + width] = -1
    survival = torch.rand(num_reqs + 3, WIDTH, generator=g)
    # Bounds of the tenths, and tokens of which nothing was promised.
    survival[survival < 0.1] = 0.5
    survival[survival > 0.95] = 1.0
    survival[(survival > 0.6) & (survival < 0.7)] = count.UNPROMISED
    slots = torch.randperm(num_reqs + 3, generator=g)[:num_reqs]
    regret = torch.where(relaxed, torch.rand(len(ids), generator=g), 0.0)
    events = torch.rand(2, num_reqs, generator=g) < 0.3
    output = VerifyOutput(None, (accepted + 1).to(torch.int32), relaxed, regret, *events)
    return ids, cu.to(id_dtype), first_draft, slots, survival, output


def totals(op, *step):
    counted = torch.full((count.SIZE,), 0.5, dtype=torch.float64)
    op(counted, *step)
    return counted - 0.5


def specified(ids, cu, first_draft, slots, survival, output):
    """The totals that a step adds, request by request."""
    _, emitted, relaxed, regret, exhausted, guarded = output
    want = torch.zeros(count.SIZE, dtype=torch.float64)
    want[count.EXHAUSTED], want[count.GUARDED] = exhausted.sum(), guarded.sum()
    for req, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
        length, accepted = int((ids[start + first_draft : end] >= 0).sum()), int(emitted[req]) - 1
        want[count.RELAXED] += relaxed[start : start + accepted].sum()
        want[count.REGRET] += regret[start : start + accepted].double().sum()
        promised = survival[slots[req], :length]
        is_accepted = torch.arange(length) < accepted
        for tenth in range(count.SURVIVAL_BINS):
            top = 1.1 if tenth == 9 else (tenth + 1) / 10
            among = (promised >= tenth / 10) & (promised < top)
            want[count.SURVIVAL_TOKENS + tenth] += among.sum()
            want[count.SURVIVAL_PROMISED + tenth] += promised[among].double().sum()
            want[count.SURVIVAL_ACCEPTED + tenth] += (among & is_accepted).sum()
    return want


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), num_reqs=st.integers(0, 40), first_draft=st.sampled_from([0, 1]))
def test_the_compiled_loop_counts_what_is_specified(seed, num_reqs, first_draft):
    step = batch(seed, num_reqs, first_draft)
    torch.testing.assert_close(totals(count.count_drafts, *step), specified(*step))


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
    step = list(batch(0, 3, 0))
    step[1] = step[1][:-1]
    with pytest.raises(ValueError, match="cu_num_rows has shape"):
        count.count_drafts(torch.zeros(count.SIZE, dtype=torch.float64), *step)
