"""The V2 adapter against a fake of the runner's device state, in the orders in which schedulers call it."""

import inspect
import logging
import types

import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange
from vllm.sampling_params import SamplingParams

from aasd_testing.alignment_rows import read
from aasd_testing.fake_v2 import (
    BLOCK,
    MAX_LEN,
    MAX_TOKENS,
    PROMPTS,
    VOCAB,
    WIDTH,
    FakeRunner,
    next_token,
    scheduled,
    serve,
    target_alone,
)
from vllm_aasd.config import Settings
from vllm_aasd.engine import patching
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v2 import rejection_sampler as v2_verifier
from vllm_aasd.engine.v2 import speculator as v2
from vllm_aasd.engine.v2.rejection_sampler import V2Verifier
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID, policies

STRICT = {"verification": "strict"}
NO_BLOCKS = {"block_ids": ([],), "num_computed_tokens": 0}


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("chunk", [MAX_LEN, 3])
def test_both_orders_emit_what_the_target_says_alone(chunk, alignment):
    wanted = [target_alone(prompt) for prompt in PROMPTS]
    runs = {}
    for fillers in (False, True):
        runner = FakeRunner(fillers=fillers, alignment=alignment, **STRICT)
        assert serve(runner, PROMPTS, chunk) == wanted
        runs[fillers] = runner
    assert runs[True].accepted == runs[False].accepted, "the same drafts are accepted, with fillers or without"
    assert sum(runs[True].accepted) > len(PROMPTS) * MAX_TOKENS / 4
    assert runs[True].num_scheduled > runs[False].num_scheduled, "only asynchronous scheduling pays for fillers"


@pytest.mark.parametrize("fillers", [False, True])
def test_the_counters_hold_what_became_of_the_drafts(fillers):
    runner = FakeRunner(fillers=fillers, alignment=True, **STRICT)
    serve(runner, PROMPTS, chunk=3)
    got = {(name, *labels.values()): value for name, labels, value in runner.speculator.counters.read()}
    tenths = [label for name, *label in got if name == "survival_tokens"]
    drafted, kept = (sum(got[name, *tenth] for tenth in tenths) for name in ("survival_tokens", "survival_accepted"))
    assert kept == sum(runner.accepted) < drafted
    # Synchronously, all that is scheduled are drafts: the rest of what was fed are prompts, and the last token emitted.
    if not fillers:
        assert drafted == runner.num_scheduled - sum(map(len, PROMPTS)) - len(runner.accepted) + len(PROMPTS)
    for (tenth,) in tenths:
        low, high = (float(bound) * got["survival_tokens", tenth] for bound in tenth.split("-"))
        assert low - 1e-3 <= got["survival_promised", tenth] <= high + 1e-3
    assert got["store_lookups", "hit"] > 0


def test_an_aborted_requests_slot_is_taken_over():
    runner = FakeRunner(max_num_reqs=2, **STRICT)
    outputs = serve(runner, PROMPTS, abort_after=3)
    assert outputs[0] == target_alone(PROMPTS[0])[: len(outputs[0])] and len(outputs[0]) < MAX_TOKENS
    assert outputs[1:] == [target_alone(prompt) for prompt in PROMPTS[1:]]


def test_a_filler_is_never_accepted_even_by_the_loosest_bar():
    loosest = {"alpha": 10.0, "beta": 0.0, "floor": 1e-4, "min_survival": 1.0, "collapse_guard": False}
    runner = FakeRunner(max_num_reqs=1, **loosest)
    # Nothing repeats, so nothing is drafted: every column is the last token again.
    runner.add(0, [9, 10, 11], 8, SamplingParams(temperature=0.0, max_tokens=8))
    runner.step([0])
    assert runner.speculator._num_drafts[0] == 0 and runner.counts[0] == WIDTH
    fillers = runner.drafts[0].clone()
    assert set(fillers.tolist()) == {int(runner.tokens[0, 3])}
    # A target that is undecided, and would rather say 1: under this bar any draft would pass.
    undecided = torch.zeros(VOCAB)
    undecided[1] = 0.5
    runner.model.head.forward = lambda pairs: undecided.repeat(len(pairs), 1)
    assert len(runner.step([0])[0]) == 1
    runner.speculator._num_drafts[0] = WIDTH
    runner.drafts[0], runner.counts[0] = fillers, 2
    assert len(runner.step([0])[0]) == 3, "had they been drafts"


def test_no_draft_beyond_what_the_request_may_emit():
    runner = FakeRunner(max_num_reqs=1, fillers=False, min_survival=0.0, **STRICT)
    prompt = [1, 2, *target_alone([1, 2], 18)]
    for max_tokens, longest in ((3, 1), (20, WIDTH)):
        runner.add(0, prompt, max_tokens, SamplingParams(temperature=0.0, max_tokens=max_tokens))
        runner.step([0])
        assert runner.speculator._num_drafts[0] == longest, "of three, one is emitted, one comes without a draft"


def test_the_store_holds_raw_predictions_by_kv_slot():
    runner = FakeRunner(max_num_reqs=2, alignment=True, **STRICT)
    serve(runner, PROMPTS[:2], chunk=3)
    for slot, prompt in enumerate(PROMPTS[:2]):
        # The last tokens emitted were never fed to the model.
        tokens = (prompt + target_alone(prompt))[: int(runner.num_computed[slot])]
        positions = torch.arange(len(tokens))
        kv_slots = runner.blocks[slot, positions // BLOCK].long() * BLOCK + positions % BLOCK
        ids, probs, fresh = read(runner.speculator._alignment.store, torch.tensor(tokens), kv_slots)
        assert fresh.all()
        says = [next_token(before, last) for before, last in zip([0, *tokens], tokens, strict=False)]
        assert ids[:, 0].tolist() == says
        assert (probs[:, 0] > 0.9).all()


def test_without_alignment_no_predictions_are_stored(monkeypatch):
    """There is no store, no hook and no write."""
    stores = []
    monkeypatch.setattr(v2, "AlignmentStore", lambda *args: stores.append(args))
    runner = FakeRunner(max_num_reqs=1, **STRICT)
    assert serve(runner, PROMPTS[1:2]) == [target_alone(PROMPTS[1])]
    assert not stores and not runner.model.head._forward_hooks
    assert sum(runner.accepted) > 0 and runner.speculator._alignment is None


def test_drafting_goes_on_where_vllm_lowers_the_models_length():
    """With `--max-model-len auto`: token ids are allocated for the longer one, block tables for the shorter."""
    for alignment in (True, False):
        runner = FakeRunner(max_num_reqs=1, allocated_len=2 * MAX_LEN, alignment=alignment, **STRICT)
        assert serve(runner, PROMPTS[:1]) == [target_alone(PROMPTS[0])]
        assert sum(runner.accepted) > 0 and not any(runner.speculator.faults.counts.values())


def test_a_slot_without_a_request_is_strict():
    """vLLM 0.33's profiling run tells of parameters for slots that hold no request."""
    runner = FakeRunner(max_num_reqs=1)
    runner.req_ids.clear()
    requests = runner.speculator.requests
    requests.add_request(0, SamplingParams(temperature=0.0))
    requests.apply_staged_writes()
    assert requests.policies.rule.tolist() == [policies.STRICT]
    assert not any(runner.speculator.faults.counts.values())


def test_logits_of_another_call_or_shape_are_not_stored():
    runner = FakeRunner(max_num_reqs=1, alignment=True, **STRICT)
    alignment = runner.speculator._alignment
    before = alignment.store.table.clone()
    runner.model.compute_logits(torch.tensor([[1, 2]]))
    alignment._expected = torch.tensor([1], dtype=torch.int32), torch.tensor([0])
    alignment._store_sampled(torch.zeros(1, VOCAB // 2))
    assert torch.equal(alignment.store.table, before)
    assert alignment._expected is None


def test_dummy_runs_touch_nothing():
    runner = FakeRunner(max_num_reqs=2, alignment=True, **STRICT)
    serve(runner, PROMPTS[:1])
    speculator = runner.speculator
    before = speculator._alignment.store.table.clone(), speculator._num_drafts.clone()
    batch = type("Batch", (), {"num_reqs": 2})()
    rows = torch.zeros(5, 2, dtype=torch.int64)
    calls = []
    runner.model.head.register_forward_hook(lambda *args: calls.append(len(args[2])))
    nothing = [None] * 8
    drafts = speculator.propose(batch, None, None, rows, *nothing[:1], *nothing[:6], dummy_run=True, is_profile=True)
    assert drafts.shape == (2, WIDTH) and int(drafts.abs().sum()) == 0
    assert calls == [5], "the profiling run must see a chunk of logits"
    assert torch.equal(speculator._alignment.store.table, before[0])
    assert torch.equal(speculator._num_drafts, before[1])


def test_prompts_that_are_read_together_share_a_pass_of_the_lm_head():
    runner = FakeRunner(max_num_reqs=4, alignment=True, **STRICT)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    runner.add(3, PROMPTS[0], 20, params)
    runner.step([3])
    for slot, prompt in enumerate(PROMPTS[:3]):
        runner.add(slot, prompt, 20, params)
    rows = []
    runner.model.head.register_forward_hook(lambda *args: rows.append(len(args[2])))
    runner.step([0, 3, 1, 2])
    sampled = 3 + 1 + runner.speculator._draft_token_ids.shape[1]
    assert rows == [sampled, len(PROMPTS[0]), len(PROMPTS[1]) + len(PROMPTS[2])]


def test_policies_and_stop_tokens_follow_the_slot():
    runner = FakeRunner(max_num_reqs=2)
    requests = runner.speculator.requests
    runner.req_ids.update({0: "a", 1: "b"})
    many = SamplingParams(temperature=0.0, stop_token_ids=[9, 3, 5, 7, 11])
    assert requests.add_request(0, many) is False
    requests.add_request(1, SamplingParams(temperature=1.0, max_tokens=1))
    requests.apply_staged_writes()
    assert requests.policies.rule.tolist() == [policies.CONDITIONAL, policies.STRICT]
    assert requests.policies.parameters[0, policies.BETA] == Settings().beta
    assert requests.policies.state_rows[0] >= 0 and requests.policies.state_rows[1] == -1
    assert requests.stop_token_ids[0, :6].tolist() == [3, 5, 7, 9, 11, -1]
    assert requests.temperature.tolist() == [0.0, 1.0]
    # In memory of the device's own, which stays where it is: vLLM's own tables are read from the host's.
    places = [table.data_ptr() for table in (requests.policies.rule, requests.temperature, requests.max_len)]
    runner.req_ids[0] = "c"
    requests.add_request(0, SamplingParams(temperature=0.0, stop_token_ids=[2]))
    assert requests.stop_token_ids[0, 0] == 3 and not requests.is_current, "until the next step"
    requests.apply_staged_writes()
    assert places == [table.data_ptr() for table in (requests.policies.rule, requests.temperature, requests.max_len)]
    assert requests.policies.rule.tolist() == [policies.CONDITIONAL, policies.STRICT]
    assert requests.stop_token_ids[0, :2].tolist() == [2, -1]


@pytest.mark.parametrize(("num_stops", "rule"), [(64, policies.CONDITIONAL), (32768, policies.STRICT)])
def test_a_long_list_of_stop_tokens_costs_its_own_request_alone(num_stops, rule):
    """Beyond the bound the request is strict, and its drafts still count; what the kernel is given stays as it was."""
    runner = FakeRunner(max_num_reqs=2)
    requests, prompt = runner.speculator.requests, [1, 2, *target_alone([1, 2], 18)]
    runner.add(0, prompt, 20, SamplingParams(temperature=0.0, max_tokens=20))
    runner.add(1, prompt, 20, SamplingParams(temperature=0.0, stop_token_ids=list(range(40, 40 + num_stops))))
    before = requests.stop_token_ids.shape
    for _ in range(3):
        emitted = runner.step([0, 1])
    assert emitted[0] == emitted[1] and len(emitted[1]) > 1
    assert requests.policies.rule.tolist() == [policies.CONDITIONAL, rule]
    assert before == requests.stop_token_ids.shape == (2, policies.MAX_STOP_TOKEN_IDS)


def test_a_request_that_wants_no_speculation_gets_no_drafts():
    for fillers in (False, True):
        runner = FakeRunner(max_num_reqs=2, fillers=fillers, **STRICT)
        prompt = [1, 2, *target_alone([1, 2], 12)]
        off = SamplingParams(temperature=0.0, max_tokens=20, extra_args={"aasd_enabled": False})
        for slot, params in enumerate((SamplingParams(temperature=0.0, max_tokens=20), off)):
            runner.add(slot, prompt, 20, params)
        emitted = [[], []]
        for _ in range(5):
            for slot, tokens in runner.step([0, 1]).items():
                emitted[slot] += tokens
            assert runner.speculator._num_drafts[1] == 0
            assert runner.counts[1] == (WIDTH if fillers else 0), "fillers are scheduled for all, or for none"
        assert len(emitted[0]) > 5 == len(emitted[1])
        wanted = target_alone(prompt, len(emitted[0]))
        assert emitted == [wanted, wanted[:5]]
        # Whoever comes next into its slot is sped up again.
        runner.add(1, prompt, 20, SamplingParams(temperature=0.0, max_tokens=20))
        runner.step([0, 1])
        assert runner.speculator._num_drafts[1] > 0


def test_a_budget_survives_preemption_and_ends_with_the_request():
    """Drafts of 2 where the target, undecided, would rather say 1: each is a near-tie of 0.1 nats."""
    runner = FakeRunner(max_num_reqs=2, verification="budget", budget_nats=0.25, collapse_guard=False)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    undecided = torch.zeros(VOCAB)
    undecided[[1, 2]] = torch.tensor([8.1, 8.0])
    runner.model.head.forward = lambda pairs: undecided.repeat(len(pairs), 1)

    def enter(slot, req_id):
        runner.add(slot, [9, 10, 11], 40, params, req_id)
        runner.step([slot])

    def relaxed(slot):
        runner.speculator._num_drafts[slot] = 1
        runner.drafts[slot, 0], runner.counts[slot] = 2, 1
        return len(runner.step([slot])[slot]) - 1

    enter(0, "a")
    assert relaxed(0) == 1
    # Preempted: another request takes the slot, and a comes back in the other one.
    enter(0, "b")
    enter(1, "a")
    assert relaxed(1) == 1, "0.2 of 0.25"
    assert relaxed(1) == 0, "the third is too much"
    assert [relaxed(0), relaxed(0), relaxed(0)] == [1, 1, 0], "b has a budget of its own"
    enter(1, "a")
    assert relaxed(1) == 0, "nor does another preemption refill it"
    runner.speculator.begin_step(scheduled(finished={"a"}))
    enter(1, "a")
    assert relaxed(1) == 1, "once it has ended, the id is another request's"


@pytest.mark.parametrize(
    ("draft_logits", "kwargs"),
    [
        (torch.zeros(1, WIDTH, VOCAB), {}),
        (None, {"synthetic_conditional_rates": torch.ones(WIDTH)}),
        (None, {"use_block_verification": True}),
        (None, {"use_fp64": True}),
        (None, {"watermark_key": 7}),
        (None, {"fly_window_size": 4}),
    ],
)
def test_what_is_not_ours_goes_to_vllms_sampler_without_the_fillers(draft_logits, kwargs, caplog):
    v2_verifier._warn_once.cache_clear()
    verifier = V2Verifier(torch.tensor([1], dtype=torch.int32), None, None, Faults(), None)
    seen = {}
    emitted = torch.tensor([[5, 7, -1]]), torch.tensor([2], dtype=torch.int32)

    def stock(**call):
        seen.update(call)
        return emitted

    # vLLM 0.33's parameters; 0.32 has fewer.
    target = patching.V2_REJECTION_SAMPLE
    names = [*target.parameters, *target.further]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    stock.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
    rows = [torch.zeros(3, VOCAB), draft_logits, torch.tensor([4, 5, 6]), torch.tensor([0, 3]), torch.arange(3)]
    rows += [
        torch.zeros(1).long(),
        torch.zeros(3).long(),
        torch.arange(3),
        torch.zeros(1),
        torch.zeros(1).long(),
        WIDTH,
    ]
    sample = v2_verifier.patch_rejection_sample(stock)
    with verifier.active(np.zeros(1, np.int32)), caplog.at_level(logging.WARNING, "vllm.aasd"):
        assert sample(*rows, **kwargs) == emitted
    assert seen["draft_sampled"].tolist() == [4, 5, PLACEHOLDER_TOKEN_ID]
    assert all(seen[name] is value for name, value in kwargs.items()) and len(seen) == len(rows) + len(kwargs)
    assert "vLLM's own rejection sampler verifies" in caplog.text


def test_what_vllm_hands_over_by_default_is_ours():
    defaults = {"fly_window_size": 0, "fly_entropy_threshold": 0.3, "fly_entropy_top_k": 3, "use_fp64": False}
    ours = dict.fromkeys(patching.V2_REJECTION_SAMPLE.parameters)
    assert v2_verifier._unsupported_argument({**ours, **defaults, "synthetic_conditional_rates": None}) is None


def test_other_engines_of_the_process_keep_vllms_sampler_and_drafter():
    replacements = v2.install()
    try:
        assert len(replacements) == 4 and v2.install() == []
        import vllm.v1.worker.gpu.model_runner as host

        with pytest.raises(AssertionError):
            host.init_speculator(type("C", (), {"speculative_config": None})(), None, None)
        assert v2_verifier.patch_rejection_sample(lambda *args: args)(*range(11)) == tuple(range(11))
    finally:
        for replacement in replacements:
            replacement.undo()
    assert not hasattr(host.init_speculator, "__wrapped__")


def test_fewer_draft_tokens_in_a_step_than_configured():
    """`num_speculative_tokens_per_batch_size` and vLLM 0.33's skipped drafts lower it, to none at all."""
    runner = FakeRunner(max_num_reqs=1, fillers=False, min_survival=0.0, **STRICT)
    prompt = [1, 2, *target_alone([1, 2], 18)]
    runner.add(0, prompt, 30, SamplingParams(temperature=0.0, max_tokens=30))
    for width in (2, 0, WIDTH):
        runner.width = width
        runner.step([0])
        assert runner.counts[0] == width
    tokens = runner.tokens[0, len(prompt) : int(runner.total_len[0])].tolist()
    assert tokens == target_alone(prompt, len(tokens))


@pytest.mark.parametrize("is_after", [False, True])
def test_what_a_former_owner_of_a_block_left_is_not_drafted_from(is_after):
    """Its entries lie under the same tokens: they can be told by the block's change of hands alone."""
    runner = FakeRunner(max_num_reqs=1, fillers=False, min_survival=0.0, alignment=True, **STRICT)
    # The target says 1, after which anything may follow.
    prompt = [1, 6, 1, 7, 1, 8, 1, 9, 0, 0]
    runner.add(0, prompt, 20, SamplingParams(temperature=0.0, max_tokens=20))
    if is_after:
        # What such an entry does to a draft.
        runner.speculator.begin_step(scheduled(runner.entered))
        runner.entered = []
    says = 8.0 * torch.nn.functional.one_hot(torch.full((len(prompt),), 31), VOCAB).float()
    # Those of its own prompt would lie over them.
    runner.speculator._alignment.store_prompts = lambda *args: None
    runner.speculator._alignment.store.write(says, torch.tensor(prompt, dtype=torch.int32), torch.arange(len(prompt)))
    runner.step([0])
    assert runner.counts[0] and (31 in runner.drafts[0]) is is_after


def test_what_fails_to_be_told_leaves_nothing_of_anybody():
    runner = FakeRunner(max_num_reqs=1, alignment=True, **STRICT)
    serve(runner, PROMPTS[:1])
    store = runner.speculator._alignment.store
    assert (store.table[:, :, 0] >= 0).any()
    told = types.SimpleNamespace(
        **{**NO_BLOCKS, "block_ids": ([len(store.table)],)}, prompt_token_ids=[1], mm_features=[]
    )
    runner.speculator.begin_step(scheduled([told]))
    assert (store.table[:, :, 0] == -1).all() and runner.speculator.faults.counts["store"] == 1


def test_placeholders_of_images_are_learnt_and_never_drafted():
    runner = FakeRunner(max_num_reqs=1, fillers=False, min_survival=0.0, **STRICT)
    prompt = [1, 2, *target_alone([1, 2], 18)]
    image = PlaceholderRange(offset=1, length=3, is_embed=torch.tensor([True, False, True]))
    feature = types.SimpleNamespace(mm_position=image)
    told = types.SimpleNamespace(**NO_BLOCKS, prompt_token_ids=[7, 31, 8, 31], mm_features=[feature])
    runner.add(0, prompt, 20, SamplingParams(temperature=0.0, max_tokens=20))
    runner.speculator.begin_step(scheduled([told]))
    runner.step([0])
    assert runner.counts[0] == WIDTH, "token 31 alone stands for the image"
    draft = runner.drafts[0].tolist()
    image = types.SimpleNamespace(mm_position=PlaceholderRange(offset=0, length=1))
    told = types.SimpleNamespace(**NO_BLOCKS, prompt_token_ids=[draft[2]], mm_features=[image])
    fresh = FakeRunner(max_num_reqs=1, fillers=False, min_survival=0.0, **STRICT)
    fresh.add(0, prompt, 20, SamplingParams(temperature=0.0, max_tokens=20))
    fresh.speculator.begin_step(scheduled([told]))
    fresh.step([0])
    first = draft.index(draft[2])
    assert fresh.counts[0] == first and fresh.drafts[0, :first].tolist() == draft[:first]
    assert fresh.speculator._placeholders.before_first(draft) == draft[:first]
