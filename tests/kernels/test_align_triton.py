"""align, align_shard and align_merge: the Triton kernels, interpreted, against their references."""

import itertools

import pytest
import torch

from aasd_testing.alignment_rows import INF, UNTOUCHED, probabilities, random_rows, untouched_table
from vllm_aasd.kernels.align import align_merge, align_shard
from vllm_aasd.kernels.align import reference as align_reference

# Relative, of float32: the kernels sum blocks of 2048 or 4096 weights, the reference sums all of a row.
TOLERANCE = 5e-5
ALIGN = "vllm_aasd.kernels.align:align"
SHARD = "vllm_aasd.kernels.align:align_shard"
MERGE = "vllm_aasd.kernels.align:align_merge"

CASES = [
    (vocab, k, dtype)
    for vocab, k in [(2, 1), (2, 2), (111, 3), (111, 8), (32000, 2), (32000, 8), (151936, 4)]
    for dtype in ("float32", "bfloat16", "float16")
]
QUICK = {(2, 2, "float32"), (2, 1, "bfloat16"), (111, 3, "float16"), (111, 8, "bfloat16"), (32000, 2, "bfloat16")}
grid = pytest.mark.parametrize(
    ("vocab_size", "top_k", "dtype"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in CASES],
)


def rows_to_align(num_rows, vocab_size, dtype, seed):
    """Logits of every odd kind, with tokens and slots; two rows are padding."""
    logits = random_rows(num_rows, vocab_size, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(2 * num_rows, generator=g)[:num_rows]
    slots[[0, num_rows - 2]] = -1
    return logits, torch.randint(0, vocab_size, (num_rows,), generator=g).int(), slots


def assert_same_entries(actual, expected, slots):
    k = actual.shape[1] // 2
    assert actual[:, : 1 + k].tolist() == expected[:, : 1 + k].tolist()
    kept = slots[slots >= 0]
    torch.testing.assert_close(probabilities(actual)[kept], probabilities(expected)[kept], rtol=TOLERANCE, atol=1e-37)
    others = torch.ones(len(actual), dtype=torch.bool)
    others[kept] = False
    assert others.any() and (actual[others] == UNTOUCHED).all()


@grid
def test_triton_equals_reference(interpreter, vocab_size, top_k, dtype):
    logits, tokens, slots = rows_to_align(9, vocab_size, getattr(torch, dtype), vocab_size + top_k)
    table = untouched_table(18, top_k)
    expected = table.clone()
    align_reference.align(logits, tokens, slots, expected)
    _, (*_, actual) = interpreter.run(ALIGN, logits, tokens, slots, table)
    assert_same_entries(actual, expected, slots)


@grid
def test_shards_merge_into_the_same_entries(interpreter, vocab_size, top_k, dtype):
    """Ranks hold parts of different sizes; kernels' partials and references' are of one kind and mix."""
    logits, tokens, slots = rows_to_align(9, vocab_size, getattr(torch, dtype), vocab_size + top_k)
    expected = untouched_table(18, top_k)
    align_reference.align(logits, tokens, slots, expected)
    bounds = [0, vocab_size] if vocab_size < 3 * top_k else [0, vocab_size // 3, vocab_size - top_k, vocab_size]
    spans = list(itertools.pairwise(bounds))
    ours = [interpreter.call(SHARD, logits[:, a:b], slots, a, top_k) for a, b in spans]
    references = [align_reference.align_shard(logits[:, a:b], slots, a, top_k) for a, b in spans]
    kept = slots >= 0
    for one, other in zip(ours, references, strict=True):
        assert torch.equal(one[kept, : 2 * top_k], other[kept, : 2 * top_k])
        sums = [partial[kept, 2 * top_k].view(torch.float32) for partial in (one, other)]
        torch.testing.assert_close(*sums, rtol=TOLERANCE, atol=0, equal_nan=True)
    table = untouched_table(18, top_k)
    for partials in (ours, references, [ours[0], *references[1:]]):
        _, (*_, actual) = interpreter.run(MERGE, torch.stack(partials), tokens, slots, table)
        assert_same_entries(actual, expected, slots)
        actual = table.clone()
        align_reference.align_merge(torch.stack(partials).flip(0), tokens, slots, actual)
        assert_same_entries(actual, expected, slots)


def test_wide_blocks(interpreter):
    """310 rows of 7000 logits take blocks of 4096; few rows took 2048."""
    logits, tokens, slots = rows_to_align(310, 7000, torch.bfloat16, 3)
    table = untouched_table(620, 2)
    expected = table.clone()
    align_reference.align(logits, tokens, slots, expected)
    _, (*_, actual) = interpreter.run(ALIGN, logits, tokens, slots, table)
    assert_same_entries(actual, expected, slots)


def test_ties_give_the_lowest_ids_first(interpreter):
    logits = torch.zeros(2, 6000)
    logits[1, [5999, 2048, 2047]] = torch.tensor([1.0, 2.0, 1.0])
    tokens, slots = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1])
    _, (*_, table) = interpreter.run(ALIGN, logits, tokens, slots, untouched_table(2, 4))
    assert table[:, 1:5].tolist() == [[0, 1, 2, 3], [2048, 2047, 5999, 0]]


@pytest.mark.parametrize("odd", [float("nan"), INF, -INF])
def test_a_row_without_softmax_is_written_with_zero_probabilities(interpreter, odd):
    """Also when only one rank, or one block, sees it."""
    logits = torch.full((2, 5000), -INF)
    logits[0, 3] = odd
    logits[1, :100] = 1.0
    logits[1, 4999] = odd
    tokens, slots = torch.tensor([7, 8], dtype=torch.int32), torch.tensor([0, 1])
    _, (*_, whole) = interpreter.run(ALIGN, logits, tokens, slots, untouched_table(2, 3))
    parts = [interpreter.call(SHARD, logits[:, a : a + 2500], slots, a, 3) for a in (0, 2500)]
    _, (*_, merged) = interpreter.run(MERGE, torch.stack(parts), tokens, slots, untouched_table(2, 3))
    expected = [0.01, 0.01, 0.01] if odd == -INF else [0.0, 0.0, 0.0]
    for table in (whole, merged):
        assert table[0].tolist() == [7, 0, 0, 0, 0, 0, 0]
        assert table[1, :4].tolist() == ([8, 0, 1, 2] if odd == -INF else [8, 0, 0, 0])
        torch.testing.assert_close(probabilities(table)[1].tolist(), expected, rtol=TOLERANCE, atol=0)


def test_slots_that_do_not_exist_are_skipped(interpreter):
    logits, tokens = torch.eye(3) * 9, torch.tensor([10, 11, 12], dtype=torch.int32)
    _, (*_, table) = interpreter.run(ALIGN, logits, tokens, torch.tensor([0, 4, 2**40]), untouched_table(4, 1))
    assert table[0, :2].tolist() == [10, 0]
    assert (table[1:] == UNTOUCHED).all()


def test_no_rows(interpreter):
    nothing = torch.empty(0, dtype=torch.int64)
    _, (*_, table) = interpreter.run(ALIGN, torch.empty(0, 9), nothing.int(), nothing, untouched_table(2, 2))
    assert (table == UNTOUCHED).all()
    assert interpreter.call(SHARD, torch.empty(0, 9), nothing, 0, 2).shape == (0, 5)


def test_bad_arguments_are_named():
    logits, slots = torch.zeros(2, 9), torch.arange(2)
    for bad, message in [
        ((logits[0], slots, 0, 2), "^logits has shape"),
        ((logits.double(), slots, 0, 2), "^logits has dtype"),
        ((logits, slots[:1], 0, 2), "^logits has shape"),
        ((logits, slots.int(), 0, 2), "^slot_mapping has dtype"),
        ((logits, slots, 0, 9), "^top_k is 9, expected 1 to 8"),
        ((logits[:, :1], slots, 0, 2), "^top_k is 2, expected 1 to 1"),
        ((logits, slots, -1, 2), "^first_token_id is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            align_shard(*bad)
    partials, tokens, table = torch.zeros(3, 2, 5).int(), torch.zeros(2).int(), untouched_table(4, 2)
    for bad, message in [
        ((partials[:, :, :3], tokens, slots, table), "^partials has shape"),
        ((partials.long(), tokens, slots, table), "^partials has dtype"),
        ((partials, tokens.long(), slots, table), "^token_ids has dtype"),
        ((partials, tokens, slots[:1], table), "has shape"),
        ((partials, tokens, slots, table[:, :4]), "^table has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            align_merge(*bad)
