"""verify and sample_recovered_tokens: the compiled CPU path against the reference, edge cases, argument checks."""

import pytest
import torch

from aasd_testing.policy_tensors import RELAXED, copied, policy_tensors
from vllm_aasd.kernels import verify as op
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.kernels.verify import cpu as verify_cpu
from vllm_aasd.kernels.verify import recovered, recovered_cpu, recovered_reference, verify, warm_up
from vllm_aasd.kernels.verify import reference as verify_reference
from vllm_aasd.kernels.verify.policies import (
    ALPHA,
    BETA,
    BUDGET,
    CAP,
    CONDITIONAL,
    FLOOR,
    FLY,
    KAPPA,
    STRICT,
    THRESHOLD,
)
from vllm_aasd.kernels.verify.relaxation_reference import binary_kl

INF, NAN = float("inf"), float("nan")
# torch's float32 softmax, which the reference uses, is off by up to 3e-5 of a probability at 150k tokens:
# decisions nearer than this to a bar may differ.
MARGIN = 5e-5
# Regret is a difference of logits on the CPU and of logarithms of float32 probabilities in the reference.
REGRET_TOLERANCE = 1e-5
# What a few such regrets, or levels, add up to.
STATE_TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialized memory with NaN and the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def policies(batch_size, relaxed=False, **given):
    """Policies of one rule; True for conditional."""
    rule = CONDITIONAL if relaxed is True else STRICT if relaxed is False else relaxed
    return policy_tensors([rule] * batch_size, **given)


def stops(*rows):
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def run_one(logits, drafts, *, greedy=True, uniform=None, stop_ids=(), bonus=99, backend=op, **policy):
    """Verify one request whose rows are `logits`; return its output as a list, and the whole result."""
    result = backend.verify(
        int32(*drafts),
        int32(len(drafts)),
        max(1, len(drafts)),
        torch.as_tensor(logits, dtype=torch.float32).reshape(len(drafts), -1) if len(drafts) else logits,
        int32(bonus),
        torch.tensor([greedy]),
        None if uniform is None else torch.tensor(uniform, dtype=torch.float64),
        policies(1, **policy),
        stops(stop_ids),
    )
    return result.output_token_ids[0].tolist(), result


def near_a_bar(logits, drafts, request, uniform, policy, stop_token_ids):
    """Return, in float64, the rows where a decision is too close to call in float32."""
    near = torch.zeros(len(drafts), dtype=torch.bool)
    for row, (i, x) in enumerate(zip(request, drafts.tolist(), strict=True)):
        if not 0 <= x < logits.shape[1]:
            continue
        probs = logits[row].double().softmax(-1)
        p = probs[x]
        if not p > 0:
            continue
        stop_ids = [s for s in stop_token_ids[i].tolist() if 0 <= s < logits.shape[1]]
        # A draft that is a stop token itself is turned down without comparing anything.
        stopping = probs[stop_ids].sum() if x not in stop_ids else torch.tensor(0.0)
        near[row] = bool(
            (
                (p - torch.stack([uniform[row], policy.parameters[i, FLOOR].double(), stopping])).abs() <= MARGIN * p
            ).any()
        )
        near[row] |= abs(over_the_bar(probs, x, policy.rule[i], policy.parameters[i].double(), uniform[row])) <= MARGIN
    return near


def over_the_bar(probs, x, rule, parameters, uniform):
    """By how much, in probability or nats, a draft clears the part of its rule that the row's statistics decide."""
    p, entropy = probs[x], torch.special.entr(probs).sum()
    if rule == CONDITIONAL:
        return float(p - (parameters[BETA] - parameters[ALPHA] * entropy))
    if rule == FLY:
        top = probs.topk(min(3, len(probs))).values
        return float(torch.special.entr(top).sum() - parameters[THRESHOLD])
    if rule == BUDGET:
        regret = float(probs.max().log() - p.log())
        kl = binary_kl(max(float(uniform), float(p)), min(float(p), 1.0))
        return min(regret - float(parameters[CAP]), kl - float(parameters[KAPPA]), key=abs)
    return float("inf")


def random_case(vocab_size, max_spec_len, dtype, seed, rule=None):
    """Build a ragged batch of 8 requests, two of them empty, with every kind of odd row in it."""
    g = torch.Generator().manual_seed(seed)
    counts = [max_spec_len, 0, max_spec_len, max(0, max_spec_len - 1), 0, max_spec_len, min(1, max_spec_len)]
    counts.append(max_spec_len)
    batch_size, n = len(counts), sum(counts)
    request = [i for i, count in enumerate(counts) for _ in range(count)]
    storage = torch.randn(n, vocab_size + 13, generator=g)
    candidates = torch.randint(0, vocab_size, (n, 4), generator=g)
    storage[:, 5 : 5 + vocab_size].scatter_(1, candidates, 12 + 2 * torch.randn(n, 4, generator=g))
    storage = storage.to(dtype)
    logits = storage[:, 5 : 5 + vocab_size]
    for row in range(n):
        kind = int(torch.randint(0, 12, (), generator=g))
        if kind == 0:
            logits[row, torch.randperm(vocab_size, generator=g)[: vocab_size // 2]] = -INF
        elif kind == 1:
            logits[row] = -INF
            logits[row, candidates[row, 0]] = 3.0
        elif kind == 2:
            logits[row, candidates[row, 1]] = NAN
        elif kind == 3:
            logits[row] = -INF
        elif kind == 4:
            logits[row, candidates[row, :2]] = logits[row].max()
    argmax = logits.float().argmax(-1)
    pick = torch.randint(0, 8, (n,), generator=g)
    drafts = torch.where(pick < 4, argmax, candidates[:, 2])
    drafts = torch.where(pick == 4, torch.randint(0, vocab_size, (n,), generator=g), drafts)
    drafts[(pick == 7) & (torch.rand(n, generator=g) < 0.2)] = -1
    is_greedy = torch.tensor([True, True, False, False, False, True, False, True])
    unit = torch.rand(10, batch_size, generator=g)
    policy = policy_tensors(
        [STRICT if i in (3, 5) else (rule or RELAXED[(seed + i // 2) % len(RELAXED)]) for i in range(batch_size)],
        alpha=0.01 + 0.2 * unit[0],
        beta=0.01 + 0.5 * unit[1],
        floor=0.01 + 0.1 * unit[2],
        window=1 + (unit[5] * 3).int(),
        threshold=0.5 * unit[6],
        cap=3 * unit[7],
        per_step=1 + (unit[8] * 3).int(),
        nats=3 * unit[9],
        kappa=unit[7],
        limit=1 + 2 * unit[8],
        decay=0.5 + 0.5 * unit[6],
        cooldown=(3 * unit[5]).int(),
        spent=unit[0],
        level=unit[1],
        strict_left=(torch.arange(batch_size) == 4) * 2,
    )
    stop_token_ids = torch.randint(-1, vocab_size, (batch_size, 3), generator=g).int()
    stop_token_ids[:, 1:][stop_token_ids[:, 1:] == stop_token_ids[:, :1]] = -1
    stop_token_ids = stop_token_ids.sort(descending=True).values
    uniform = torch.rand(n, dtype=torch.float64, generator=g)
    near = near_a_bar(logits, drafts, request, uniform, policy, stop_token_ids)
    drafts[near] = -1
    bonus = torch.randint(0, vocab_size, (batch_size, 1), generator=g)
    cu = torch.tensor(counts).cumsum(0).int()
    arguments = (drafts.int(), cu, max_spec_len, logits, bonus, is_greedy, uniform, policy, stop_token_ids)
    return arguments, int(near.sum())


def on_both_paths(arguments):
    """The results of the CPU path and of the reference, after having compared them and what they left in the state."""
    results, states = [], []
    for path in (verify_cpu, verify_reference):
        own = copied(arguments[7])
        results.append(path.verify(*arguments[:7], own, *arguments[8:]))
        states.append(own.state)
    actual, expected = results
    torch.testing.assert_close(actual.regret, expected.regret, rtol=0, atol=REGRET_TOLERANCE)
    torch.testing.assert_close(*states, rtol=0, atol=STATE_TOLERANCE)
    for field in ("output_token_ids", "num_accepted", "relaxed", "exhausted", "guarded"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field
    return actual, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_spec_len", [0, 1, 3, 8])
@pytest.mark.parametrize("vocab_size", [2, 111, 32000, 151936])
def test_cpu_path_equals_reference(vocab_size, max_spec_len, dtype):
    seeds = range(20 if vocab_size <= 111 else 1)
    skipped = rows = relaxed = 0
    for seed in seeds:
        arguments, near = random_case(vocab_size, max_spec_len, dtype, seed)
        actual, _expected = on_both_paths(arguments)
        skipped, rows, relaxed = skipped + near, rows + len(arguments[0]), relaxed + int(actual.relaxed.sum())
    # Exact ties, made on purpose, are most of these: at two tokens a draft often ties with a stop token.
    assert skipped <= max(1, 0.05 * rows)
    # Where the cases are many, the relaxed branch must have been reached.
    assert relaxed > 0 or rows <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [2, 111, 32000, 151936])
def test_recovered_tokens_equal_the_references(vocab_size, dtype):
    arguments, _ = random_case(vocab_size, 8, dtype, seed=1)
    drafts, logits = arguments[0], arguments[3]
    rows = torch.randperm(len(drafts), generator=torch.Generator().manual_seed(2))
    noise = torch.empty(len(rows), vocab_size + 3).exponential_(generator=torch.Generator().manual_seed(3))
    inv_q = noise.reciprocal()[:, :vocab_size]
    actual = recovered_cpu.sample_recovered_tokens(logits, rows, drafts[rows], inv_q)
    assert torch.equal(actual, recovered_reference.sample_recovered_tokens(logits, rows, drafts[rows], inv_q))
    assert ((actual >= 0) & (actual < vocab_size)).all()


both_paths = pytest.mark.parametrize("path", [verify_cpu, verify_reference], ids=["cpu", "reference"])


@both_paths
def test_greedy_takes_the_lowest_of_tied_maxima_and_zero_equals_minus_zero(path):
    assert run_one([[-0.0, 0.0, -1.0]], [0], backend=path)[0] == [0, 99]
    assert run_one([[-0.0, 0.0, -1.0]], [1], backend=path)[0] == [0, -1]
    assert run_one([[-1.0, 2.0, 2.0]], [2], backend=path)[0] == [1, -1]
    tied = torch.zeros(1, 5000)
    tied[0, [2049, 4100]] = 1.0
    assert run_one(tied, [4100], backend=path)[0] == [2049, -1]


@both_paths
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    "row", [[NAN] * 4, [1.0, NAN, 2.0, 3.0], [1.0, 2.0, -NAN, 3.0], [-INF] * 4, [0.0, INF, 0.0, INF]]
)
def test_a_row_without_softmax_does_no_harm(path, greedy, row):
    argmax = int(torch.tensor(row).argmax())
    for draft in range(4):
        tokens, result = run_one(
            [row], [draft], greedy=greedy, uniform=[0.0], relaxed=True, floor=1e-4, beta=0.0, backend=path
        )
        accepted = greedy and draft == argmax
        assert tokens == ([draft, 99] if accepted else [argmax if greedy else -1, -1])
        assert not result.relaxed.any() and not result.regret.any()
        sample = (recovered_cpu if path is verify_cpu else recovered_reference).sample_recovered_tokens
        assert 0 <= int(sample(torch.tensor([row]), torch.tensor([0]), int32(draft), torch.ones(1, 4))) < 4


@both_paths
@pytest.mark.parametrize("relaxed", [True, False])
def test_a_token_without_probability_is_rejected_even_for_u_of_zero(path, relaxed):
    row = [0.0, -INF, -200.0, 0.0]
    for draft in (1, 2, -1, 4, 2**31 - 1):
        tokens, _ = run_one([row], [draft], greedy=False, uniform=[0.0], relaxed=relaxed, floor=0.0, beta=0.0,
                            backend=path)  # fmt: skip
        assert tokens == [-1, -1]
        tokens, _ = run_one([row], [draft], relaxed=relaxed, floor=0.0, beta=0.0, backend=path)
        assert tokens == [0, -1]


@both_paths
def test_end_of_sequence_guard(path):
    row = torch.log(torch.tensor([[0.35, 0.30, 0.20, 0.15]]))
    loose = {"relaxed": True, "alpha": 0.0, "beta": 0.1, "floor": 0.1, "backend": path}
    assert run_one(row, [1], **loose)[0] == [1, 99]
    assert run_one(row, [1], stop_ids=[2], **loose)[0] == [1, 99]
    assert run_one(row, [1], stop_ids=[1], **loose)[0] == [0, -1], "a stop token is no relaxed acceptance"
    assert run_one(row, [2], stop_ids=[1], **loose)[0] == [0, -1], "the target would rather stop"
    assert run_one(row, [1], stop_ids=[2, 3], **loose)[0] == [0, -1], "stop tokens count together"
    assert run_one(row, [0], stop_ids=[0], **loose)[0] == [0, 99], "the argmax is accepted strictly"
    even = torch.log(torch.tensor([[0.4, 0.3, 0.3]]))
    assert run_one(even, [2], stop_ids=[1], **loose)[0] == [0, -1], "as likely as stopping is not likelier"


@both_paths
def test_a_probability_equal_to_the_bar_passes(path):
    half = [[0.0, 0.0]]
    assert run_one(half, [1], greedy=False, uniform=[0.5], backend=path)[0] == [1, 99]
    for bar in ({"floor": 0.5, "beta": 0.0}, {"floor": 0.1, "beta": 0.5}):
        assert run_one(half, [1], relaxed=True, alpha=0.0, backend=path, **bar)[0] == [1, 99]
    for bar in ({"floor": 0.501, "beta": 0.0}, {"floor": 0.1, "beta": 0.501}):
        assert run_one(half, [1], relaxed=True, alpha=0.0, backend=path, **bar)[0] == [0, -1]


@both_paths
def test_sampled_relaxed_requests_always_accept_the_argmax_above_the_floor(path):
    row = torch.log(torch.tensor([[0.3, 0.25, 0.25, 0.2]]))
    high = {"greedy": False, "uniform": [0.99], "relaxed": True, "alpha": 0.0, "beta": 0.9, "backend": path}
    assert run_one(row, [0], floor=0.1, **high)[0] == [0, 99]
    assert run_one(row, [0], floor=0.4, **high)[0] == [-1, -1]
    assert run_one(row, [1], floor=0.1, **high)[0] == [-1, -1]


@both_paths
def test_regret_and_relaxed_stand_only_in_the_accepted_prefix(path):
    row = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    tokens, result = run_one(
        row.repeat(4, 1), [1, 0, 2, 1], relaxed=True, beta=0.25, alpha=0.0, floor=0.1, backend=path
    )
    assert tokens == [1, 0, 0, -1, -1]
    assert result.relaxed.tolist() == [True, False, False, False]
    torch.testing.assert_close(result.regret, torch.tensor([0.5108256, 0, 0, 0]), rtol=0, atol=1e-6)


@both_paths
def test_requests_without_drafts_emit_their_bonus_token(path):
    nothing = torch.empty(0, dtype=torch.int32)
    result = path.verify(
        nothing, int32(0, 0), 3, torch.empty(0, 7), torch.tensor([[4], [5]]), torch.tensor([True, False]),
        torch.empty(0, dtype=torch.float64), policies(2), stops([], []),
    )  # fmt: skip
    assert result.output_token_ids.tolist() == [[4, -1, -1, -1], [5, -1, -1, -1]]
    assert result.num_accepted.tolist() == [0, 0]


def test_cpu_tensors_run_on_the_compiled_path(monkeypatch):
    assert verify_op._implementation("cpu") is verify_cpu
    calls = []
    monkeypatch.setattr(verify_cpu, "_verify_kernel", lambda *args: calls.append(1) or -1)
    run_one([[0.0, 1.0]], [1])
    assert calls == [1]


def test_nothing_compiles_after_warm_up():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        warm_up(torch.device("cpu"), dtype)
        recovered.warm_up(torch.device("cpu"), dtype)
    kernels = (verify_cpu._verify_kernel, recovered_cpu._noise_kernel)
    before = [len(kernel.signatures) for kernel in kernels]
    for dtype in (torch.float32, torch.bfloat16):
        arguments, _ = random_case(111, 3, dtype, seed=0)
        verify(*arguments)
        recovered.sample_recovered_tokens(arguments[3][::2], torch.tensor([1]), int32(0), torch.ones(2, 200)[1:, 3:114])
        verify(*arguments[:4], arguments[4].int()[:, 0], *arguments[5:8], arguments[8][:, ::3])
    run_one(torch.zeros(1, 5), [0])
    assert [len(kernel.signatures) for kernel in kernels] == before


def test_bad_arguments_are_named():
    good = list(random_case(111, 3, torch.float32, seed=0)[0])
    names = ["draft_token_ids", "cu_num_draft_tokens", "", "target_logits", "bonus_token_ids", "is_greedy"]
    for position, name in [*enumerate(names), (6, "uniform_probs"), (8, "stop_token_ids")]:
        if name:
            bad = list(good)
            bad[position] = good[position].to(torch.complex64)
            with pytest.raises(ValueError, match=f"^{name} has dtype"):
                verify(*bad)
            bad[position] = good[position][:-1]
            with pytest.raises(ValueError, match="has shape"):
                verify(*bad)
    for field in good[7]._fields:
        with pytest.raises(ValueError, match=rf"^policies\.{field} has shape"):
            verify(*good[:7], good[7]._replace(**{field: torch.ones(1)}), good[8])
        bad = getattr(good[7], field).double()
        with pytest.raises(ValueError, match=rf"^policies\.{field} has dtype"):
            verify(*good[:7], good[7]._replace(**{field: bad}), good[8])
    with pytest.raises(ValueError, match=r"^uniform_probs is None"):
        verify(*good[:6], None, *good[7:])
    with pytest.raises(ValueError, match=r"^target_logits has stride 2"):
        verify(*good[:3], torch.zeros(len(good[0]), 222)[:, ::2], *good[4:])
    for cu in ([3, 2, 2, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4], [3, 3, 6, 9, 12, 15, 18, 21]):
        with pytest.raises(ValueError, match=r"^cu_num_draft_tokens\[\d\] is"):
            verify(good[0], int32(*cu), *good[2:])
    with pytest.raises(ValueError, match=r"^rows\[1\] is 99"):
        recovered.sample_recovered_tokens(good[3], torch.tensor([0, 99]), int32(1, 1), torch.ones(2, 111))
    with pytest.raises(ValueError, match=r"^inv_q has shape"):
        recovered.sample_recovered_tokens(good[3], torch.tensor([0]), int32(1), torch.ones(1, 110))
