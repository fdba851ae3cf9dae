"""Sampling parameters that vLLM's V1 runner mishandles under speculation, piece by piece; the whole engine in
`test_engine_parameters`."""

import random
import types

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from aasd_testing.fake_v1 import FakeRunner
from vllm_aasd.config import Settings
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1 import chosen_logprobs
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.engine.v1.thinking import UndraftedBudgets

VOCAB = 7
LENGTH = 40


def thinking(seed, num_spec_tokens, wrapped):
    """What a target emits that thinks, with a budget, before and after other things, over and over."""
    rng = random.Random(seed)
    start, end = rng.choice([[5], [5, 4]]), [6, 3, 1][: rng.choice([1, 2, 3])]
    prompt = [*rng.choices(range(4), k=4), *(start if rng.random() < 0.6 else []), *rng.choices(range(4), k=2)]
    reasoning = types.SimpleNamespace(reasoning_start_token_ids=start, reasoning_end_token_ids=end)
    holder = ThinkingBudgetStateHolder(reasoning, 2, num_spec_tokens, torch.device("cpu"), False)
    emitted: list[int] = []
    asked = types.SimpleNamespace(thinking_token_budget=rng.randrange(9))
    # Behind a request without a budget.
    holder.sync_batch(types.SimpleNamespace(removed=[], added=[(1, asked, prompt, emitted)], moved=[]))
    budgets = UndraftedBudgets(holder, {1}) if wrapped else holder
    neighbor = random.Random(seed)
    while len(emitted) < LENGTH:
        says = random.Random(f"{seed} {(prompt + emitted)[-2:]}").randrange(VOCAB)
        bonus = torch.nn.functional.one_hot(torch.tensor([0, says]), VOCAB).float()
        drafts = [[2] * neighbor.randrange(4) if wrapped else [], []]
        budgets.update_state([[], emitted], drafts, None)
        bonus = budgets.apply_to_logits(bonus, num_spec_tokens > 0, drafts)
        assert bonus[0].argmax() == 0, "the neighbor hasn't been asked to stop thinking"
        if drafts[0]:
            rows = torch.zeros(len(drafts[0]), VOCAB)
            assert not budgets.apply_to_logits(rows, False, drafts).any(), "these rows are the neighbor's"
        emitted.append(int(bonus[1].argmax()))
    return emitted


def test_thinking_ends_as_without_speculation():
    assert all(thinking(seed, 4, wrapped=True) == thinking(seed, 0, wrapped=False) for seed in range(300))


def test_vllms_own_budgets_are_late_under_speculation():
    """If this fails, vLLM has mended it, and requests with a budget may have drafts again."""
    assert any(thinking(seed, 4, wrapped=False) != thinking(seed, 0, wrapped=False) for seed in range(300))


def test_a_row_does_not_inherit_a_budget_that_has_ended():
    """vLLM forgets to drop it when it moves a request without a budget into the row."""
    reasoning = types.SimpleNamespace(reasoning_start_token_ids=[5], reasoning_end_token_ids=[6])
    holder = ThinkingBudgetStateHolder(reasoning, 2, 4, torch.device("cpu"), False)
    budget, none = (types.SimpleNamespace(thinking_token_budget=tokens) for tokens in (0, None))
    added = [(0, budget, [1, 5], []), (1, none, [1, 2], [])]
    holder.sync_batch(types.SimpleNamespace(removed=[], added=added, moved=[]))
    move = (1, 0, MoveDirectionality.UNIDIRECTIONAL)
    holder.sync_batch(types.SimpleNamespace(removed=[], added=[], moved=[move]))
    assert holder.has_tracked_requests(), "vLLM's fault; once it is mended, this can go"
    budgets = UndraftedBudgets(holder, set())
    budgets.update_state([[3]], None)
    logits = budgets.apply_to_logits(torch.zeros(1, VOCAB), predict_bonus_token=True, spec_token_ids=None)
    assert not budgets.has_tracked_requests() and not logits.any()


@pytest.mark.parametrize(
    ("asked", "is_drafted"),
    [
        ({}, True),
        ({"logprobs": 3}, True),
        ({"logprob_token_ids": [3, 4]}, False),
        ({"thinking_token_budget": 0}, False),
    ],
)
def test_requests_that_drafts_mislead_have_none(asked, is_drafted):
    requests = V1Requests(Settings(), Faults())
    requests.admit(["a"], {"a": types.SimpleNamespace(sampling_params=SamplingParams(**asked))})
    assert requests.is_drafted("a") is is_drafted


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
@pytest.mark.parametrize(("width", "num_likeliest"), [(1, None), (3, None), (1, 1), (3, 5)])
def test_chosen_logprobs_are_put_beside_the_likeliest(mode, width, num_likeliest):
    """Of three requests with up to `width` tokens each, the first and the last have chosen tokens."""
    sampler = Sampler(mode)
    rows = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    reported = rows if mode.startswith("raw") else sampler.compute_logprobs(rows) if "logprobs" in mode else rows
    emitted = torch.randint(0, VOCAB, (3, width), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    chosen = {0: [4, 2], 2: [5]}
    likeliest = None
    if num_likeliest is not None:
        tokens = emitted.flatten().long()
        likeliest = sampler.gather_logprobs(torch.randn(3 * width, VOCAB), num_likeliest, tokens)
    output = SamplerOutput(sampled_token_ids=emitted, logprobs_tensors=likeliest)
    chosen_logprobs.put_in(output, RejectionSampler(sampler), [reported], chosen)
    wanted = rows if "logits" in mode else rows.log_softmax(-1)
    got: LogprobsTensors = output.logprobs_tensors
    assert len(got.logprobs) == 3 * width
    for request, token_ids in chosen.items():
        at = request * width
        tokens = [int(emitted[request, 0]), *token_ids]
        assert got.logprob_token_ids[at, : len(tokens)].tolist() == tokens
        torch.testing.assert_close(got.logprobs[at, : len(tokens)], wanted[request, tokens])
        assert got.selected_token_ranks[at] == 1 + (wanted[request] > wanted[request, tokens[0]]).sum()
    if likeliest is not None:
        others = slice(width, 2 * width)
        for mine, theirs in zip(got[:2], likeliest[:2], strict=True):
            assert torch.equal(mine[others, : num_likeliest + 1], theirs[others])
        assert torch.equal(got.selected_token_ranks[others], likeliest.selected_token_ranks[others])


def test_a_draft_ends_before_the_least_tokens_do():
    """The token after it may be the one that stops the request."""
    least = 5
    runner = FakeRunner({}, max_num_reqs=2, draft_length=8, verification="strict")
    prompt = [1, 2, 3] * 4
    runner.add("a", prompt, min_tokens=least, stop_token_ids=[60])
    runner.add("b", prompt)
    crosses = {"a": False, "b": False}
    for _ in range(20):
        for req_id, draft in runner.drafts.items():
            num_emitted = len(runner.tokens[req_id]) - len(prompt)
            crosses[req_id] |= num_emitted < least <= num_emitted + len(draft)
        runner.step()
    assert crosses == {"a": False, "b": True}


def serve_embedded(is_embedded):
    """Lengths of the drafts after each token, for a request whose row holds, or would hold, a prompt that repeats."""
    runner = FakeRunner({}, max_num_reqs=1, verification="strict")
    texts = runner.proposer._drafter._texts._indexes[0].tokens
    if is_embedded:
        runner.input_batch.req_prompt_embeds[0] = torch.zeros(12, 8)
    runner.add("a", [1, 2, 3] * 4, max_tokens=8, extra_args={"vllm_aasd.namespace": 0})
    lengths = []
    for _ in range(6):
        runner.step()
        lengths.append(len(runner.drafts["a"]))
    assert set(runner.proposer.faults.counts.values()) == {0}
    return lengths, {1, 2, 3} <= set(texts.tolist())


def test_a_prompt_of_embeddings_is_neither_looked_up_nor_remembered():
    """Nothing is written in its row, which holds the prompt of its former occupant."""
    assert serve_embedded(is_embedded=False) == ([0, 0, 4, 0, 3, 3], True)
    # Two tokens of output repeat by the fifth step.
    assert serve_embedded(is_embedded=True) == ([0, 0, 0, 0, 3, 0], False)
