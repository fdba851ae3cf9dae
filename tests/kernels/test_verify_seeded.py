"""verify_seeded: the Triton kernels, interpreted, against the reference, edge cases, argument checks."""

import pytest
import torch

from aasd_testing.policy_tensors import copied
from aasd_testing.seeded_batches import INF, NAN, batch, random_batch
from vllm_aasd.kernels.verify import seeded
from vllm_aasd.kernels.verify import seeded_reference as verify_seeded_reference
from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

# Regret is a difference of two logits on either path.
REGRET_TOLERANCE = 1e-6
# Sums of a few regrets, divergences, or levels, in another order.
STATE_TOLERANCE = 1e-5
OP = "vllm_aasd.kernels.verify.seeded:verify_seeded"
RAGGED = {0: [1, 1, 0, 1], 1: [2, 1, 2, 0, 2], 3: [4, 0, 3, 4, 1, 4, 4], 8: [9, 1, 9, 5, 0, 9]}


@pytest.fixture(params=["triton", "reference"])
def path(request):
    """The op as the interpreter runs it, and the reference."""
    if request.param == "reference":
        return lambda arguments: verify_seeded_reference.verify_seeded(SeededBatch(**arguments))
    interpreter = request.getfixturevalue("interpreter")
    return lambda arguments: interpreter.call(OP, SeededBatch(**arguments))


def run_both(interpreter, arguments):
    """(what the Triton kernels give, what the reference gives), after having compared what they left in the state."""
    own = {**arguments, "policies": copied(arguments["policies"])}
    actual, left = interpreter.call("aasd_testing.interpreter:verify_and_state", own)
    expected = verify_seeded_reference.verify_seeded(SeededBatch(**own))
    torch.testing.assert_close(left, own["policies"].state, rtol=0, atol=STATE_TOLERANCE)
    return actual, expected


def assert_equal(actual, expected):
    assert actual.sampled.tolist() == expected.sampled.tolist()
    assert actual.num_sampled.tolist() == expected.num_sampled.tolist()
    assert actual.relaxed.tolist() == expected.relaxed.tolist()
    assert actual.exhausted.tolist() == expected.exhausted.tolist()
    assert actual.guarded.tolist() == expected.guarded.tolist()
    torch.testing.assert_close(actual.regret, expected.regret, rtol=0, atol=REGRET_TOLERANCE)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape


CASES = [
    (vocab_size, num_drafts, dtype)
    for vocab_size in (2, 111, 32000, 151936)
    for num_drafts in RAGGED
    for dtype in ("float32", "bfloat16")
]
QUICK = {(2, 3, "float32"), (111, 0, "float32"), (111, 8, "bfloat16"), (111, 3, "float32")}


@pytest.mark.parametrize(
    ("vocab_size", "num_drafts", "dtype"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in CASES] + [(6000, 3, "float16")],
)
def test_triton_equals_reference(interpreter, vocab_size, num_drafts, dtype):
    counts = RAGGED[num_drafts]
    arguments = random_batch(vocab_size, counts, getattr(torch, dtype), seed=vocab_size + num_drafts)
    assert_equal(*run_both(interpreter, arguments))


def test_the_random_batches_reach_every_outcome():
    """What the comparison with the reference is worth: over its batches, all branches of the rule are taken."""
    seen = set()
    for seed in range(40):
        arguments = random_batch(111, RAGGED[3], torch.float32, seed)
        result = verify_seeded_reference.verify_seeded(SeededBatch(**arguments))
        for req, slot in enumerate(arguments["idx_mapping"].tolist()):
            start, end = arguments["cu_num_logits"][req : req + 2].tolist()
            kind = "greedy" if arguments["temperature"][slot] == 0 else "sampled"
            emitted = int(result.num_sampled[req])
            if end - start > 1:
                seen.add((kind, "bonus" if emitted == end - start else "rejected"))
                if result.relaxed[start:end].any():
                    seen.add((kind, "relaxed"))
                if emitted < end - start and arguments["draft_sampled"][start + emitted] < 0:
                    seen.add((kind, "placeholder"))
    outcomes = ("bonus", "rejected", "relaxed", "placeholder")
    assert seen == {(kind, outcome) for kind in ("greedy", "sampled") for outcome in outcomes}


def test_a_large_vocabulary_and_wide_blocks(interpreter):
    """Few rows of 151936 logits take narrow blocks, many rows of 7000 wide ones."""
    arguments = random_batch(151936, [2, 1], torch.bfloat16, seed=2)
    assert_equal(*run_both(interpreter, arguments))
    arguments = random_batch(7000, [2] * 152, torch.bfloat16, seed=3)
    arguments["temperature"].zero_()
    arguments["all_greedy"] = True
    assert_equal(*run_both(interpreter, arguments))


@pytest.mark.long
def test_triton_equals_twin_on_real_logits(interpreter, demo_model):
    """The demo model's own logits over a text, the text's tokens as drafts: greedy, sampled, conditional."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of France is Paris."
    tokens = AutoTokenizer.from_pretrained(demo_model)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)(tokens).logits[0]
    rows = [logits[i : i + 5].clone() for i in (4, 9, 14, 17)]
    drafts = [tokens[0, i + 1 : i + 5].tolist() for i in (4, 9, 14, 17)]
    arguments = batch(
        rows * 2, drafts * 2, temperature=[0.0] * 4 + [1.0] * 4, seed=range(8), relaxed=[True, False] * 4,
        beta=[0.3] * 8, floor=[0.02] * 8, stops=[[0, 2]] * 8,
    )  # fmt: skip
    actual, expected = run_both(interpreter, arguments)
    assert_equal(actual, expected)
    assert len(expected.num_sampled.unique()) > 1


def test_greedy_takes_the_lowest_of_tied_maxima(path):
    row = torch.zeros(5000)
    row[[2049, 4100]] = 1.0
    result = path(batch([row.expand(2, -1)] * 3, [[2049], [4100], [-1]]))
    assert result.sampled.tolist() == [[2049, 2049], [2049, -1], [2049, -1]]
    result = path(batch([[[-0.0, 0.0, -1.0]] * 2], [[0]]))
    assert result.sampled.tolist() == [[0, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row", [[NAN] * 4, [1.0, NAN, 2.0, 3.0], [1.0, 2.0, -NAN, 3.0], [-INF] * 4, [0.0, INF, 0.0, INF]]
)
def test_a_row_without_softmax_does_no_harm(path, temperature, row):
    """Such a row, and a good one beside it, for every draft."""
    good = [0.0, 5.0, 1.0, 2.0]
    drafts = [[0], [1], [2], [3], [-1], [1]]
    arguments = batch(
        [[row, row]] * 5 + [[good, good]], drafts, temperature=[temperature] * 6, relaxed=[True] * 6,
        beta=[0.0] * 6, floor=[1e-4] * 6, seed=range(6),
    )  # fmt: skip
    result = path(arguments)
    argmax = int(torch.tensor(row).argmax())
    for i, (draft,) in enumerate(drafts[:5]):
        tokens, count = result.sampled[i].tolist(), int(result.num_sampled[i])
        accepted = temperature == 0 and draft == argmax
        assert count == 1 + accepted
        assert tokens == ([argmax, argmax] if accepted else [tokens[0], -1])
        assert 0 <= tokens[0] < 4
        if temperature == 0 or draft not in (argmax, -1):
            assert tokens[0] == argmax
    assert result.sampled[5, 0] == 1
    assert not result.relaxed[:10].any() and not result.regret[:10].any()


def test_a_token_without_probability_is_rejected_and_never_drawn(path):
    n = 20
    rows = [[[0.0, -INF, -200.0, 1.0]] * 2] * n
    drafts = [[(1, 2, -1, 4, 2**31 - 1)[i % 5]] for i in range(n)]
    result = path(
        batch(rows, drafts, temperature=[1.0] * n, seed=range(n), relaxed=[True] * n, beta=[0.0] * n,
              floor=[0.0] * n)
    )  # fmt: skip
    assert result.num_sampled.tolist() == [1] * n
    assert set(result.sampled[:, 0].tolist()) == {0, 3}


def test_end_of_sequence_guard_and_bars(path):
    row = torch.log(torch.tensor([0.35, 0.30, 0.20, 0.15])).tolist()
    half = [0.0, 0.0, -INF, -INF]
    cases = [  # row, draft, stops, alpha, beta, floor, accepted
        (row, 1, [], 0.0, 0.1, 0.1, True),
        (row, 1, [2], 0.0, 0.1, 0.1, True),
        (row, 1, [1], 0.0, 0.1, 0.1, False),
        (row, 2, [1], 0.0, 0.1, 0.1, False),
        (row, 1, [2, 3], 0.0, 0.1, 0.1, False),
        (row, 0, [0], 0.0, 0.1, 0.1, True),
        # However long the list; ids outside the vocabulary are nothing.
        (row, 1, [7, 8, 9, 10, 2], 0.0, 0.1, 0.1, True),
        (row, 1, [7, 8, 9, 10, 1], 0.0, 0.1, 0.1, False),
        (row, 1, [7, 8, 9, 10, 0], 0.0, 0.1, 0.1, False),
        (row, 1, [], 0.0, 0.1, 0.31, False),
        (row, 1, [], 0.0, 0.31, 0.1, False),
        # The entropy is 1.34 nats.
        (row, 1, [], 0.2, 0.55, 0.1, True),
        (row, 1, [], 0.2, 0.58, 0.1, False),
        (half, 1, [], 0.0, 0.0, 0.5, True),
        (half, 1, [], 0.0, 0.5, 0.1, True),
        (half, 1, [], 0.0, 0.501, 0.1, False),
        (half, 1, [0], 0.0, 0.1, 0.1, False),
    ]
    rows, drafts, stops, alpha, beta, floor, accepted = zip(*cases, strict=True)
    result = path(
        batch([[r, r] for r in rows], [[d] for d in drafts], relaxed=[True] * len(cases), stops=stops,
              alpha=alpha, beta=beta, floor=floor)
    )  # fmt: skip
    assert (result.num_sampled == 2).tolist() == list(accepted)
    strict = [draft == 0 for draft in drafts]
    assert result.relaxed[::2].tolist() == [a and not s for a, s in zip(accepted, strict, strict=True)]
    regret = torch.tensor(0.35 / 0.30).log()
    torch.testing.assert_close(result.regret[0], regret, rtol=0, atol=1e-6)


def test_the_entropy_is_that_of_the_whole_row(path):
    """The row of the test above, a token in each of three blocks: 1.34 nats, of which blocks see a part."""
    row = torch.full((2, 5000), -INF)
    row[:, [10, 2100, 3000, 4500]] = torch.log(torch.tensor([0.35, 0.30, 0.20, 0.15]))
    result = path(
        batch([row, row], [[2100], [2100]], relaxed=[True] * 2, alpha=[0.2] * 2, beta=[0.55, 0.58],
              floor=[0.1] * 2)
    )  # fmt: skip
    assert result.num_sampled.tolist() == [2, 1]


def test_regret_and_relaxed_stand_only_in_the_accepted_prefix(path):
    row = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    result = path(batch([row.repeat(5, 1)], [[1, 0, 2, 1]], relaxed=[True], beta=[0.25], alpha=[0.0]))
    assert result.sampled.tolist() == [[1, 0, 0, -1, -1]]
    assert result.relaxed.tolist() == [True, False, False, False, False]
    torch.testing.assert_close(result.regret, torch.tensor([0.5108256, 0, 0, 0, 0]), rtol=0, atol=1e-6)


def test_batches_of_nothing(path):
    for rows in ([], [torch.empty(0, 7)] * 3):
        result = path(batch(rows, [[]] * len(rows), num_speculative_steps=2))
        assert result.sampled.tolist() == [[-1, -1, -1]] * len(rows)
        assert result.num_sampled.tolist() == [0] * len(rows)


def test_padding_rows_are_left_alone(interpreter):
    """Rows after the last request, of no slot, and slots after the batch, do not disturb."""
    arguments = random_batch(300, [3, 3, 2, 3], torch.float32, seed=4)
    expected = verify_seeded_reference.verify_seeded(
        SeededBatch(**{**arguments, "policies": copied(arguments["policies"])})
    )
    n = len(arguments["target_logits"])
    for name, value in (("target_logits", NAN), ("draft_sampled", 3), ("pos", 0), ("expanded_idx_mapping", -1),
                        ("expanded_local_pos", 0)):  # fmt: skip
        tensor = arguments[name]
        arguments[name] = torch.cat([tensor, torch.full((2, *tensor.shape[1:]), value, dtype=tensor.dtype)])
    actual = interpreter.call(OP, SeededBatch(**arguments))
    assert_equal(actual._replace(relaxed=actual.relaxed[:n], regret=actual.regret[:n]), expected)


def test_which_backend_runs_where(interpreter):
    assert seeded._implementation("cpu") is verify_seeded_reference
    assert seeded._implementation("cuda").__name__ == "vllm_aasd.kernels.verify.triton"
    assert (
        interpreter.call("aasd_testing.interpreter:backend_name", "verify.seeded") == "vllm_aasd.kernels.verify.triton"
    )
    assert interpreter.call("aasd_testing.interpreter:backend_name", "align") == "vllm_aasd.kernels.align.triton"


def test_bad_arguments_are_named():
    good = random_batch(20, [2, 3], torch.float32, seed=0)
    verify_seeded(SeededBatch(**good))
    for name, tensor in good.items():
        if isinstance(tensor, torch.Tensor):
            with pytest.raises(ValueError, match=f"^{name} has dtype"):
                verify_seeded(SeededBatch(**{**good, name: tensor.to(torch.complex64)}))
    for name in ("draft_sampled", "pos", "idx_mapping", "expanded_idx_mapping", "expanded_local_pos", "seed"):
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            verify_seeded(SeededBatch(**{**good, name: good[name][:-1]}))
        with pytest.raises(ValueError, match=f"^{name} has strides"):
            verify_seeded(SeededBatch(**{**good, name: good[name].repeat_interleave(2)[::2]}))
    with pytest.raises(ValueError, match=r"^target_logits has stride 2"):
        verify_seeded(SeededBatch(**{**good, "target_logits": torch.zeros(5, 40)[:, ::2]}))
    for field, tensor in good["policies"]._asdict().items():
        with pytest.raises(ValueError, match=rf"^policies\.{field} has shape"):
            verify_seeded(SeededBatch(**{**good, "policies": good["policies"]._replace(**{field: torch.ones(1)})}))
        with pytest.raises(ValueError, match=rf"^policies\.{field} has dtype"):
            verify_seeded(SeededBatch(**{**good, "policies": good["policies"]._replace(**{field: tensor.double()})}))
    with pytest.raises(ValueError, match=r"^num_speculative_steps is -1"):
        verify_seeded(SeededBatch(**{**good, "num_speculative_steps": -1}))
