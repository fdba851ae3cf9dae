"""align, align_shard and align_merge: compiled paths and references against float64, odd rows, argument checks."""

import itertools

import pytest
import torch

from aasd_testing.alignment_rows import UNTOUCHED, probabilities, untouched_table
from vllm_aasd.gpu_check.inputs import random_rows, rows_to_align
from vllm_aasd.gpu_check.verify_inputs import INF
from vllm_aasd.kernels import align as op
from vllm_aasd.kernels.align import align, align_merge, align_shard, cpu, reference, warm_up

# Relative. The CPU path sums float32 weights in blocks and the blocks in float64; the reference and the Triton kernels
# sum in float32, which is off by up to 3e-5 for 150k weights.
TOLERANCE = {"cpu": 1e-6, "reference": 5e-5, "triton": 5e-5}
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


@pytest.fixture(params=TOLERANCE)
def path(request):
    """Aligns on one of the implementations; gives the table that it leaves."""
    interpreter = request.getfixturevalue("interpreter") if request.param == "triton" else None

    def run(logits, tokens, slots, table):
        tokens, slots = torch.as_tensor(tokens, dtype=torch.int32), torch.as_tensor(slots, dtype=torch.int64)
        if interpreter is not None:
            return interpreter.run("vllm_aasd.kernels.align:align", logits, tokens, slots, table)[1][-1]
        {"cpu": cpu, "reference": reference}[request.param].align(logits, tokens, slots, table)
        return table

    run.tolerance = TOLERANCE[request.param]
    return run


def assert_entries(table, logits, tokens, slots, tolerance):
    """Compare a table with what the logits say in float64."""
    k = table.shape[1] // 2
    written = slots >= 0
    rows = logits[written].double()
    order = rows.sort(descending=True, stable=True).indices[:, :k]
    has_softmax = rows.amax(-1).isfinite()
    entries = table[slots[written]]
    assert torch.equal(entries[:, 0], tokens[written])
    assert torch.equal(entries[:, 1 : 1 + k].long(), torch.where(has_softmax[:, None], order, 0))
    exact = torch.where(has_softmax[:, None], rows.softmax(-1).gather(1, order), 0.0).float()
    torch.testing.assert_close(probabilities(entries), exact, rtol=tolerance, atol=1e-37)
    others = torch.ones(len(table), dtype=torch.bool)
    others[slots[written]] = False
    assert others.any() and (table[others] == UNTOUCHED).all()


@grid
def test_entries_are_those_of_float64(path, vocab_size, top_k, dtype):
    given = rows_to_align(9, vocab_size, getattr(torch, dtype), vocab_size + top_k)
    assert_entries(path(*given, untouched_table(18, top_k)), *given, path.tolerance)


def test_wide_blocks(path):
    """310 rows of 7000 logits take blocks of 4096; few rows take 2048."""
    given = rows_to_align(310, 7000, torch.bfloat16, 3)
    assert_entries(path(*given, untouched_table(620, 2)), *given, path.tolerance)


@grid
def test_shards_merge_into_the_same_entries(interpreter, vocab_size, top_k, dtype):
    """Ranks hold parts of different sizes; kernels' partials and references' are of one kind and mix."""
    given = rows_to_align(9, vocab_size, getattr(torch, dtype), vocab_size + top_k)
    logits, tokens, slots = given
    bounds = [0, vocab_size] if vocab_size < 3 * top_k else [0, vocab_size // 3, vocab_size - top_k, vocab_size]
    spans = list(itertools.pairwise(bounds))
    ours = [interpreter.call(SHARD, logits[:, a:b], slots, a, top_k) for a, b in spans]
    references = [reference.align_shard(logits[:, a:b], slots, a, top_k) for a, b in spans]
    kept = slots >= 0
    for one, other in zip(ours, references, strict=True):
        assert torch.equal(one[kept, : 2 * top_k], other[kept, : 2 * top_k])
        sums = [partial[kept, 2 * top_k].view(torch.float32) for partial in (one, other)]
        torch.testing.assert_close(*sums, rtol=TOLERANCE["triton"], atol=0, equal_nan=True)
    for partials in (ours, references, [ours[0], *references[1:]]):
        _, (*_, table) = interpreter.run(MERGE, torch.stack(partials), tokens, slots, untouched_table(18, top_k))
        assert_entries(table, *given, TOLERANCE["triton"])
        table = untouched_table(18, top_k)
        reference.align_merge(torch.stack(partials).flip(0), tokens, slots, table)
        assert_entries(table, *given, TOLERANCE["triton"])


def test_entry_layout(path):
    table = path(torch.log(torch.tensor([[0.2, 0.5, 0.05, 0.25]])), [42], [1], untouched_table(3, 2))
    assert table[1, :3].tolist() == [42, 1, 3]
    torch.testing.assert_close(probabilities(table)[1], torch.tensor([0.5, 0.25]))
    assert (table[[0, 2]] == UNTOUCHED).all()


def test_ties_give_the_lowest_ids_first(path):
    logits = torch.zeros(2, 6000)
    logits[1, [5999, 2048, 2047]] = torch.tensor([1.0, 2.0, 1.0])
    table = path(logits, [0, 0], [0, 1], untouched_table(2, 4))
    assert table[:, 1:5].tolist() == [[0, 1, 2, 3], [2048, 2047, 5999, 0]]


@pytest.mark.parametrize("odd", [float("nan"), INF, -INF])
def test_a_row_without_softmax_is_written_with_zero_probabilities(path, interpreter, odd):
    """Also when only one rank, or one block, sees it."""
    logits = torch.full((2, 5000), -INF)
    logits[0, 3] = odd
    logits[1, :100] = 1.0
    logits[1, 4999] = odd
    tokens, slots = torch.tensor([7, 8], dtype=torch.int32), torch.tensor([0, 1])
    parts = [interpreter.call(SHARD, logits[:, a : a + 2500], slots, a, 3) for a in (0, 2500)]
    _, (*_, merged) = interpreter.run(MERGE, torch.stack(parts), tokens, slots, untouched_table(2, 3))
    expected = [0.01, 0.01, 0.01] if odd == -INF else [0.0, 0.0, 0.0]
    for table in (path(logits, tokens, slots, untouched_table(2, 3)), merged):
        assert table[0].tolist() == [7, 0, 0, 0, 0, 0, 0]
        assert table[1, :4].tolist() == ([8, 0, 1, 2] if odd == -INF else [8, 0, 0, 0])
        torch.testing.assert_close(probabilities(table)[1].tolist(), expected, rtol=TOLERANCE["triton"], atol=0)


def test_the_last_of_equal_slots_wins_on_cpus():
    for path in (cpu, reference):
        table = untouched_table(1, 1)
        path.align(torch.eye(3) * 9, torch.tensor([10, 11, 12], dtype=torch.int32), torch.tensor([0, 0, -1]), table)
        assert table[0, :2].tolist() == [11, 1]


def test_slots_that_do_not_exist_are_skipped_on_gpus(interpreter):
    tokens, slots = torch.tensor([10, 11, 12], dtype=torch.int32), torch.tensor([0, 4, 2**40])
    _, (*_, table) = interpreter.run(
        "vllm_aasd.kernels.align:align", torch.eye(3) * 9, tokens, slots, untouched_table(4, 1)
    )
    assert table[0, :2].tolist() == [10, 0]
    assert (table[1:] == UNTOUCHED).all()


def test_no_rows(path):
    assert (path(torch.empty(0, 9), [], [], untouched_table(2, 2)) == UNTOUCHED).all()


def test_cpu_tensors_run_on_the_compiled_path_and_nothing_compiles_after_warm_up():
    assert op._implementation("cpu") is cpu
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        warm_up(torch.device("cpu"), dtype)
    before = len(cpu._align_kernel.signatures)
    for top_k in (1, 4):
        logits = random_rows(4, 50, torch.bfloat16, seed=0)
        align(logits, torch.zeros(8, dtype=torch.int32)[::2], torch.arange(4), untouched_table(4, top_k))
    assert len(cpu._align_kernel.signatures) == before


def test_bad_arguments_are_named():
    logits, tokens, slots = torch.zeros(2, 9), torch.zeros(2).int(), torch.arange(2)
    partials, table = torch.zeros(3, 2, 5).int(), untouched_table(4, 2)
    for of, bad, message in [
        (align, (logits[0], tokens, slots, table), "^logits has shape"),
        (align, (logits[:1], tokens, slots, table), "^logits has shape"),
        (align, (logits.double(), tokens, slots, table), "^logits has dtype"),
        (align, (torch.zeros(2, 18)[:, ::2], tokens, slots, table), "^logits has stride 2"),
        (align, (logits, tokens.long(), slots, table), "^token_ids has dtype"),
        (align, (logits, tokens[:1], slots, table), "^token_ids has shape"),
        (align, (logits, tokens, slots.int(), table), "^slot_mapping has dtype"),
        (align, (logits, tokens, slots, table.long()), "^table has dtype"),
        (align, (logits, tokens, slots, table[:, :4]), "^table has shape"),
        (align, (logits, tokens, slots, untouched_table(4, op.MAX_TOP_K + 1)), "^table has shape"),
        (align, (logits[:, :1], tokens, slots, table), "^table has shape"),
        (align, (logits, tokens, slots, untouched_table(4, 4)[:, :5]), "^table has strides"),
        (align, (logits, tokens, slots + 3, table), r"^slot_mapping\[1\] is 4, table has 4 slots"),
        (align_shard, (logits[0], slots, 0, 2), "^logits has shape"),
        (align_shard, (logits.double(), slots, 0, 2), "^logits has dtype"),
        (align_shard, (logits, slots[:1], 0, 2), "^logits has shape"),
        (align_shard, (logits, slots.int(), 0, 2), "^slot_mapping has dtype"),
        (align_shard, (logits, slots, 0, 9), "^top_k is 9, expected 1 to 8"),
        (align_shard, (logits[:, :1], slots, 0, 2), "^top_k is 2, expected 1 to 1"),
        (align_shard, (logits, slots, -1, 2), "^first_token_id is -1"),
        (align_merge, (partials[:, :, :3], tokens, slots, table), "^partials has shape"),
        (align_merge, (partials.long(), tokens, slots, table), "^partials has dtype"),
        (align_merge, (partials, tokens.long(), slots, table), "^token_ids has dtype"),
        (align_merge, (partials, tokens, slots[:1], table), "has shape"),
        (align_merge, (partials, tokens, slots, table[:, :4]), "^table has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            of(*bad)
