"""The compiled paths of verify and verify_seeded against their references; dispatch, warm-up, argument checks."""

import pytest
import torch

from aasd_testing import verify_paths
from vllm_aasd.gpu_check.verify_inputs import NAN, batch, copied, random_batch, settle
from vllm_aasd.kernels.verify import cpu, reference, seeded, verify, warm_up
from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

# Regret is a difference of two logits on every path.
REGRET_TOLERANCE = 1e-6
# What a few regrets, divergences or levels add up to, by op.
STATE_TOLERANCE = {"cpu": 5e-5, "triton": 1e-5}
RAGGED = {0: [1, 1, 0, 1], 1: [2, 1, 2, 0, 2], 3: [4, 0, 3, 4, 1, 4, 4], 8: [9, 1, 9, 5, 0, 9]}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialized memory with NaN and the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_equal(actual, expected):
    for name in ("sampled", "num_sampled", "relaxed", "exhausted", "guarded"):
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist(), name
    torch.testing.assert_close(actual.regret, expected.regret, rtol=0, atol=REGRET_TOLERANCE)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape


def v1_case(vocab_size, max_spec_len, dtype, seed):
    """A V1 batch of 8 requests, whose recovered tokens are drawn with noise; and the rows that were too close."""
    counts = [max_spec_len, 0, max_spec_len, max(0, max_spec_len - 1), 0, max_spec_len, min(1, max_spec_len)]
    counts.append(max_spec_len)
    arguments = random_batch(vocab_size, [1 + count for count in counts], dtype, seed)
    near = settle(arguments)
    made, _ = verify_paths.as_v1(arguments)
    noise = torch.empty(8, vocab_size).exponential_(generator=torch.Generator().manual_seed(seed)).reciprocal()
    return made._replace(inv_q=noise, inv_q_rows=torch.arange(8).flip(0).int()), near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_spec_len", [0, 1, 3, 8])
@pytest.mark.parametrize("vocab_size", [2, 111, 32000, 151936])
def test_cpu_path_equals_reference(vocab_size, max_spec_len, dtype):
    skipped = rows = relaxed = 0
    for seed in range(20 if vocab_size <= 111 else 1):
        made, near = v1_case(vocab_size, max_spec_len, dtype, seed)
        results, states = [], []
        for path in (cpu, reference):
            own = copied(made.policies)
            results.append(path.verify(made._replace(policies=own)))
            states.append(own.state)
        assert_equal(*results)
        torch.testing.assert_close(*states, rtol=0, atol=STATE_TOLERANCE["cpu"])
        skipped, rows, relaxed = skipped + near, rows + len(made.draft_token_ids), relaxed + results[0].relaxed.sum()
    # Exact ties, made on purpose, are most of these: at two tokens a draft often ties with a stop token.
    assert skipped <= max(1, 0.05 * rows)
    # Where the cases are many, the relaxed branch must have been reached.
    assert relaxed > 0 or rows <= 100


def run_both(interpreter, arguments):
    """(what the Triton kernels give, what the reference gives), after having compared what they left in the state."""
    own = verify_paths.with_own_state(arguments)
    actual, left, totals = interpreter.call("aasd_testing.interpreter:verify_and_state", own)
    expected = reference.verify_seeded(SeededBatch(**own))
    torch.testing.assert_close(left, own["policies"].state, rtol=0, atol=STATE_TOLERANCE["triton"])
    torch.testing.assert_close(totals, own["totals"])
    return actual, expected


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
    arguments = random_batch(vocab_size, RAGGED[num_drafts], getattr(torch, dtype), seed=vocab_size + num_drafts)
    assert_equal(*run_both(interpreter, arguments))


def test_the_random_batches_reach_every_outcome():
    """What the comparisons with the reference are worth: over their batches, all branches of the rule are taken."""
    seen = set()
    for seed in range(40):
        arguments = random_batch(111, RAGGED[3], torch.float32, seed)
        result = reference.verify_seeded(SeededBatch(**arguments))
        for req, slot in enumerate(arguments["idx_mapping"].tolist()):
            start, end = arguments["cu_num_logits"][req : req + 2].tolist()
            kind = "greedy" if arguments["temperature"][slot] == 0 else "sampled"
            emitted = int(result.num_sampled[req])
            if end - start > 1:
                seen.add((kind, "bonus" if emitted == end - start else "rejected"))
                if result.relaxed[start:end].any():
                    seen.add((kind, "relaxed"))
                if emitted < end - start:
                    is_filler = emitted > arguments["num_drafts"][slot]
                    is_placeholder = arguments["draft_sampled"][start + emitted] < 0
                    seen |= {
                        (kind, name)
                        for name, is_so in (("filler", is_filler), ("placeholder", is_placeholder))
                        if is_so
                    }
                if result.exhausted[req]:
                    seen.add((kind, "exhausted"))
    outcomes = ("bonus", "rejected", "relaxed", "placeholder", "filler", "exhausted")
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
def test_triton_equals_reference_on_real_logits(interpreter, demo_model):
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


def test_draft_tokens_without_room_for_a_promise_are_not_counted(interpreter):
    arguments = random_batch(111, RAGGED[8], torch.float32, seed=5)
    narrow = arguments | {"survival": arguments["survival"][:, :2].contiguous()}
    assert_equal(*run_both(interpreter, narrow))
    counted = []
    for given in (arguments, narrow):
        own = verify_paths.with_own_state(given)
        reference.verify_seeded(SeededBatch(**own))
        counted.append(float((own["totals"] - given["totals"]).sum()))
    assert 0 < counted[1] < counted[0]


def test_padding_rows_are_left_alone(interpreter):
    """Rows after the last request, and request indices that aren't in the batch, do not disturb."""
    arguments = random_batch(300, [3, 3, 2, 3], torch.float32, seed=4)
    expected = reference.verify_seeded(SeededBatch(**verify_paths.with_own_state(arguments)))
    n = len(arguments["target_logits"])
    for name, value in (("target_logits", NAN), ("draft_sampled", 3), ("pos", 0), ("expanded_idx_mapping", -1),
                        ("expanded_local_pos", 0)):  # fmt: skip
        tensor = arguments[name]
        arguments[name] = torch.cat([tensor, torch.full((2, *tensor.shape[1:]), value, dtype=tensor.dtype)])
    actual = interpreter.call("vllm_aasd.kernels.verify.seeded:verify_seeded", SeededBatch(**arguments))
    assert_equal(actual._replace(relaxed=actual.relaxed[:n], regret=actual.regret[:n]), expected)


def test_which_backend_runs_where(interpreter):
    assert seeded._implementation("cpu") is reference
    assert seeded._implementation("cuda").__name__ == "vllm_aasd.kernels.verify.triton"
    for name in ("verify", "align"):
        implementation = interpreter.call("aasd_testing.interpreter:backend_name", name.replace("ify", "ify.seeded"))
        assert implementation == f"vllm_aasd.kernels.{name}.triton"


def test_nothing_compiles_after_warm_up():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        warm_up(torch.device("cpu"), dtype)
    before = len(cpu._verify_kernel.signatures)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made, _ = v1_case(111, 3, dtype, seed=0)
        for changes in ({}, {"inv_q": None, "inv_q_rows": None}, {"stop_token_ids": made.stop_token_ids[:, ::3]},
                        {"bonus_token_ids": made.bonus_token_ids.int()[:, None]}):  # fmt: skip
            verify(made._replace(**changes))
    assert len(cpu._verify_kernel.signatures) == before


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_bad_arguments_are_named():
    v1, arguments = v1_case(111, 3, torch.float32, seed=0)[0], random_batch(20, [2, 3], torch.float32, seed=0)
    v2 = SeededBatch(**arguments)
    verify_seeded(v2)
    for op_, good in ((verify, v1), (verify_seeded, v2)):
        for name, tensor in good._asdict().items():
            if isinstance(tensor, torch.Tensor):
                with pytest.raises(ValueError, match=f"^{name} has dtype"):
                    op_(good._replace(**{name: tensor.to(torch.complex64)}))
                if name not in ("inv_q", "temperature"):
                    with pytest.raises(ValueError, match="has shape"):
                        op_(good._replace(**{name: tensor[:-1]}))
        for field, tensor in good.policies._asdict().items():
            with pytest.raises(ValueError, match=rf"^policies\.{field} has shape"):
                op_(good._replace(policies=good.policies._replace(**{field: torch.ones(1)})))
            with pytest.raises(ValueError, match=rf"^policies\.{field} has dtype"):
                op_(good._replace(policies=good.policies._replace(**{field: tensor.double()})))
        with pytest.raises(ValueError, match=r"^target_logits has stride 2"):
            op_(good._replace(target_logits=torch.zeros(len(good.target_logits), 40)[:, ::2]))
    for name in ("uniform_probs", "recovered_probs"):
        with pytest.raises(ValueError, match=f"^{name} is None"):
            verify(v1._replace(**{name: None}))
    with pytest.raises(ValueError, match=r"^inv_q_rows holds 7, inv_q has 3 rows"):
        verify(v1._replace(inv_q=v1.inv_q[:3]))
    for cu in ([3, 2, 2, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4], [3, 3, 6, 9, 12, 15, 18, 21]):
        with pytest.raises(ValueError, match=r"^cu_num_draft_tokens\[\d\] is"):
            verify(v1._replace(cu_num_draft_tokens=int32(*cu)))
    for name in ("draft_sampled", "pos", "idx_mapping", "expanded_idx_mapping", "expanded_local_pos", "seed"):
        with pytest.raises(ValueError, match=f"^{name} has strides"):
            verify_seeded(v2._replace(**{name: getattr(v2, name).repeat_interleave(2)[::2]}))
    with pytest.raises(ValueError, match=r"^num_speculative_steps is -1"):
        verify_seeded(v2._replace(num_speculative_steps=-1))
