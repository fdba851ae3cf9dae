"""align: the compiled CPU path against the plain torch reference, odd rows, argument checks."""

import pytest
import torch

from aasd_testing.alignment_rows import INF, UNTOUCHED, probabilities, random_rows, untouched_table
from vllm_aasd.kernels import align as align_op
from vllm_aasd.kernels import align as op
from vllm_aasd.kernels.align import align, warm_up
from vllm_aasd.kernels.align import cpu as align_cpu
from vllm_aasd.kernels.align import reference as align_reference

# Relative. The CPU path sums float32 weights in blocks and the blocks in float64; the reference takes torch's
# float32 softmax, whose sum of 150k weights is off by up to 3e-5.
CPU_TOLERANCE = 1e-6
TWIN_TOLERANCE = 5e-5

both_paths = pytest.mark.parametrize("path", [align_cpu, align_reference], ids=["cpu", "reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab_size", "top_k"),
    [(2, 1), (2, 2), (111, 1), (111, 4), (111, 8), (32000, 2), (32000, 8), (151936, 4)],
)
def test_cpu_path_equals_reference(vocab_size, top_k, dtype):
    num_rows = 18 if vocab_size < 1000 else 9
    logits = random_rows(num_rows, vocab_size, dtype, seed=vocab_size + top_k)
    g = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=g).int()
    slots = torch.randperm(2 * num_rows, generator=g)[:num_rows]
    slots[[0, 7]] = -1
    actual, expected = untouched_table(2 * num_rows, top_k), untouched_table(2 * num_rows, top_k)
    align_cpu.align(logits, token_ids, slots, actual)
    align_reference.align(logits, token_ids, slots, expected)
    assert torch.equal(actual[:, : 1 + top_k], expected[:, : 1 + top_k])
    written = slots[slots >= 0]
    exact = logits[slots >= 0].double().softmax(-1).nan_to_num().topk(top_k).values.float()
    torch.testing.assert_close(probabilities(actual)[written], exact, rtol=CPU_TOLERANCE, atol=1e-37)
    torch.testing.assert_close(probabilities(expected)[written], exact, rtol=TWIN_TOLERANCE, atol=1e-37)
    others = torch.ones(2 * num_rows, dtype=torch.bool)
    others[written] = False
    assert int(others.sum()) == num_rows + 2
    assert (actual[others] == UNTOUCHED).all()


@both_paths
def test_entry_layout(path):
    table = untouched_table(3, 2)
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.05, 0.25]]))
    path.align(logits, torch.tensor([42], dtype=torch.int32), torch.tensor([1]), table)
    assert table[1, :3].tolist() == [42, 1, 3]
    torch.testing.assert_close(probabilities(table)[1], torch.tensor([0.5, 0.25]))
    assert (table[[0, 2]] == UNTOUCHED).all()


@both_paths
def test_ties_give_the_lowest_ids_first(path):
    logits = torch.zeros(2, 6000)
    logits[1, [5999, 2048, 2047]] = torch.tensor([1.0, 2.0, 1.0])
    table = untouched_table(2, 4)
    path.align(logits, torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1]), table)
    assert table[:, 1:5].tolist() == [[0, 1, 2, 3], [2048, 2047, 5999, 0]]


@both_paths
@pytest.mark.parametrize("odd", [float("nan"), INF, -INF])
def test_a_row_without_softmax_is_written_with_zero_probabilities(path, odd):
    logits = torch.full((1, 5), -INF)
    logits[0, 3] = odd
    table = untouched_table(1, 3)
    path.align(logits, torch.tensor([7], dtype=torch.int32), torch.tensor([0]), table)
    assert table.tolist() == [[7, 0, 0, 0, 0, 0, 0]]


@both_paths
def test_the_last_of_equal_slots_wins(path):
    logits = torch.eye(3) * 9
    table = untouched_table(1, 1)
    path.align(logits, torch.tensor([10, 11, 12], dtype=torch.int32), torch.tensor([0, 0, -1]), table)
    assert table[0, :2].tolist() == [11, 1]


def test_cpu_tensors_run_on_the_compiled_path_and_nothing_compiles_after_warm_up():
    assert align_op._implementation("cpu") is align_cpu
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        warm_up(torch.device("cpu"), dtype)
    before = len(align_cpu._align_kernel.signatures)
    for top_k in (1, 4):
        logits = random_rows(4, 50, torch.bfloat16, seed=0)
        align(logits, torch.zeros(8, dtype=torch.int32)[::2], torch.arange(4), untouched_table(4, top_k))
    align(torch.empty(0, 50), torch.zeros(0, dtype=torch.int32), torch.arange(0), untouched_table(4, 2))
    assert len(align_cpu._align_kernel.signatures) == before


def test_bad_arguments_are_named():
    logits, tokens, slots = torch.zeros(2, 9), torch.zeros(2).int(), torch.arange(2)
    table = untouched_table(4, 2)
    for bad, message in [
        ((logits[0], tokens, slots, table), "^logits has shape"),
        ((logits[:1], tokens, slots, table), "^logits has shape"),
        ((logits.double(), tokens, slots, table), "^logits has dtype"),
        ((torch.zeros(2, 18)[:, ::2], tokens, slots, table), "^logits has stride 2"),
        ((logits, tokens.long(), slots, table), "^token_ids has dtype"),
        ((logits, tokens[:1], slots, table), "^token_ids has shape"),
        ((logits, tokens, slots.int(), table), "^slot_mapping has dtype"),
        ((logits, tokens, slots, table.long()), "^table has dtype"),
        ((logits, tokens, slots, table[:, :4]), "^table has shape"),
        ((logits, tokens, slots, untouched_table(4, op.MAX_TOP_K + 1)), "^table has shape"),
        ((logits[:, :1], tokens, slots, table), "^table has shape"),
        ((logits, tokens, slots, untouched_table(4, 4)[:, :5]), "^table has strides"),
        ((logits, tokens, slots + 3, table), r"^slot_mapping\[1\] is 4, table has 4 slots"),
    ]:
        with pytest.raises(ValueError, match=message):
            align(*bad)
