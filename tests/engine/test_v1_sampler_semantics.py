"""What vLLM expects of a rejection sampler on the V1 runner, with ours in its place.

From its documentation and source (`vllm/v1/sample/rejection_sampler.py`): a request emits its accepted drafts, and
after them one more token, the recovered one if a draft was rejected and the bonus one where none was; placeholders fill
the row; a log-probability row belongs to each emitted token; a seed decides everything that is random; and nothing
depends on what else is in the batch.
"""

import dataclasses
import itertools
import types
from typing import NamedTuple

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, LogitsProcessors, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_aasd.config import Settings
from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier
from vllm_aasd.engine.v1 import sampler_patches
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.requests import V1Requests

VOCAB = 40
MAX_DRAFTS = 4


class Request(NamedTuple):
    """One request of a step.

    Attributes:
        logits: ``[num_drafts + 1, VOCAB]`` float32.
        drafts: token ids.
        temperature, seed: as of its sampling parameters.
        is_strict: else it is verified by `conditional`.
    """

    logits: torch.Tensor
    drafts: list[int]
    temperature: float
    seed: int
    is_strict: bool

    @property
    def argmax(self) -> list[int]:
        return self.logits.argmax(-1).tolist()


def some_requests(seed):
    """Greedy and sampled, strict and not, of 0 to `MAX_DRAFTS` drafts of which most are likely."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for number in range(12):
        logits = 2.5 * torch.randn(1 + number % (MAX_DRAFTS + 1), VOCAB, generator=g)
        # Near-ties, for `conditional` to let something by.
        best = logits.topk(2).indices
        logits.scatter_(1, best[:, 1:], logits.gather(1, best[:, :1]) - 0.05)
        pick = torch.rand(len(logits), generator=g)
        drafts = torch.where(pick < 0.5, best[:, 0], torch.where(pick < 0.8, best[:, 1], 3))[:-1]
        made.append(Request(logits, drafts.tolist(), (0.0, 1.0)[number % 2], 100 * seed + number, number % 3 > 0))
    return made


@pytest.fixture(scope="module")
def v1():
    """vLLM's own sampler module of the V1 runner, with our verifier in it."""
    replacements = sampler_patches.install()
    yield V1()
    for replacement in replacements:
        replacement.undo()


class V1:
    """Runs a step; gives each request's row of the sampler's output."""

    def __init__(self):
        self.sampler = RejectionSampler(Sampler())

    def __call__(self, requests):
        rows = self.sample(requests).sampled_token_ids.tolist()
        # Here a row is as wide as the longest draft of the step.
        return [row + [-1] * (MAX_DRAFTS + 1 - len(row)) for row in rows]

    def sample(self, requests, logprobs=None):
        counts = torch.tensor([len(request.drafts) for request in requests])
        rows = torch.arange(int((counts + 1).sum()))
        bonus = (counts + 1).cumsum(0) - 1
        metadata = SpecDecodeMetadata(
            draft_token_ids=torch.tensor(
                [token for request in requests for token in request.drafts], dtype=torch.int32
            ),
            num_draft_tokens=counts.tolist(),
            cu_num_draft_tokens=counts.cumsum(0).int(),
            cu_num_sampled_tokens=(counts + 1).cumsum(0).int(),
            target_logits_indices=rows[~torch.isin(rows, bonus)],
            bonus_logits_indices=bonus,
            logits_indices=rows,
        )
        verifier = self.verifier(requests)
        with verifier.active():
            output = self.sampler(
                metadata, None, torch.cat([request.logits for request in requests]), of_sampling(requests, logprobs)
            )
        assert verifier.is_on and not any(verifier._faults.counts.values()), "ours, not vLLM's own, has verified"
        return output

    @staticmethod
    def verifier(requests):
        faults = Faults()
        of_requests = V1Requests(Settings(allow_request_override="any"), faults)
        counting = V1Counting(Counters("cpu"), Faults(), len(requests), MAX_DRAFTS)
        made = v1_verifier.V1Verifier(of_requests, len(requests), torch.device("cpu"), faults, counting)
        states = {}
        for number, request in enumerate(requests):
            options = {"aasd_verification": "strict"} if request.is_strict else {"aasd_relax_sampling": True}
            params = SamplingParams(temperature=request.temperature, extra_args=options)
            states[str(number)] = types.SimpleNamespace(sampling_params=params)
        of_requests.admit(states, states)
        made.begin_step(list(states))
        return made


def greedy_requests(seed, dtype):
    return [request._replace(logits=request.logits.to(dtype), temperature=0.0) for request in some_requests(seed)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_v1_verifies_the_lm_heads_rows_as_it_does_vllms_copies(v1, monkeypatch, dtype, seed):
    requests = greedy_requests(seed, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(sampler_patches, "_is_argmax", lambda metadata: False)
        wanted = v1(requests)
    before = [request.logits.clone() for request in requests]
    # Nothing of vLLM's sampler is asked.
    monkeypatch.setattr(RejectionSampler, "apply_logits_processors", None)
    monkeypatch.setattr(Sampler, "forward", None)
    assert v1(requests) == wanted
    assert all(torch.equal(request.logits, was) for request, was in zip(requests, before, strict=True))
    assert any(
        len(request.drafts) > sum(token >= 0 for token in row) - 1
        for request, row in zip(requests, wanted, strict=True)
    )


def min_tokens(min_toks):
    processor = MinTokensLogitsProcessor.__new__(MinTokensLogitsProcessor)
    processor.min_toks = min_toks
    return LogitsProcessors([processor])


class Foreign(LogitsProcessor):
    """One that isn't vLLM's."""

    def __init__(self):
        pass

    def apply(self, logits):
        return logits

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass


@pytest.mark.parametrize(
    ("changes", "is_argmax"),
    [
        ({}, True),
        ({"logitsprocs": min_tokens({})}, True),
        ({"logprob_token_ids": {}}, True),
        ({"thinking_budget_state_holder": types.SimpleNamespace(has_tracked_requests=lambda: False)}, True),
        ({"all_greedy": False}, False),
        ({"max_num_logprobs": 0}, False),
        ({"logprob_token_ids": {0: [3]}}, False),
        ({"no_penalties": False}, False),
        ({"allowed_token_ids_mask": torch.zeros(1, VOCAB, dtype=torch.bool)}, False),
        ({"bad_words_token_ids": {0: [[3]]}}, False),
        ({"logitsprocs": min_tokens({0: (5, [], {3}, False)})}, False),
        ({"logitsprocs": LogitsProcessors([Foreign()])}, False),
        ({"thinking_budget_state_holder": types.SimpleNamespace(has_tracked_requests=lambda: True)}, False),
    ],
)
def test_v1_leaves_to_vllm_what_changes_logits_or_keeps_them(changes, is_argmax):
    plain = of_sampling(greedy_requests(0, torch.float32), None)
    assert sampler_patches._is_argmax(dataclasses.replace(plain, **changes)) is is_argmax


def of_sampling(requests, logprobs):
    """The step's `SamplingMetadata`, of sampled requests a generator each."""
    temperature = torch.tensor([request.temperature for request in requests])
    nothing = torch.zeros(len(requests))
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()),
        top_p=None,
        top_k=None,
        generators={
            number: torch.Generator().manual_seed(request.seed)
            for number, request in enumerate(requests)
            if request.temperature > 0
        },
        max_num_logprobs=logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing + 1,
        output_token_ids=[[] for _ in requests],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


SEEDS = range(4)


def num_accepted(request, row):
    """Of a request's row, how many drafts it begins with, after the form that every row must have."""
    emitted = [token for token in row if token != -1]
    assert row == emitted + [-1] * (MAX_DRAFTS + 1 - len(emitted)), "placeholders after the tokens, nowhere else"
    assert 1 <= len(emitted) <= len(request.drafts) + 1
    assert all(0 <= token < VOCAB for token in emitted)
    assert emitted[:-1] == request.drafts[: len(emitted) - 1], "drafts in their order, then one more"
    return len(emitted) - 1


def test_accepted_drafts_then_one_token_then_placeholders(v1):
    seen = set()
    for seed in SEEDS:
        requests = some_requests(seed)
        for request, row in zip(requests, v1(requests), strict=True):
            count = num_accepted(request, row)
            if count < len(request.drafts):
                assert row[count] != request.drafts[count], "what was rejected there isn't drawn there"
            if request.temperature == 0:
                assert row[count] == request.argmax[count], "recovered or bonus, a greedy token is the target's"
                if request.is_strict:
                    assert row[:count] == request.argmax[:count]
            seen.add((request.temperature > 0, request.is_strict, count == len(request.drafts), count > 0))
    assert len(seen) >= 12, "each kind of request with all, some and no drafts accepted"


def test_the_same_seeds_give_the_same_tokens_and_others_give_others(v1):
    changed = 0
    for seed in SEEDS:
        requests = some_requests(seed)
        first = v1(requests)
        assert v1(requests) == first
        others = v1([request._replace(seed=request.seed + 5000) for request in requests])
        for request, row, other in zip(requests, first, others, strict=True):
            if request.temperature == 0:
                assert row == other, "greedy requests have nothing random"
            changed += row != other
    assert changed > 8


def test_a_request_gets_in_any_batch_what_it_gets_alone(v1):
    for seed in SEEDS:
        requests = some_requests(seed)
        alone = [v1([request])[0] for request in requests]
        assert v1(requests) == alone
        assert v1(requests[::-1]) == alone[::-1]
        assert v1(requests[3:7]) == alone[3:7]


def test_v1_a_log_probability_row_for_each_emitted_token(v1):
    for seed in SEEDS:
        # Asked for by somebody in the batch, they are computed for all.
        requests = some_requests(seed)
        output = v1.sample(requests, logprobs=2)
        tokens, found = RejectionSampler.parse_output(
            output.sampled_token_ids, VOCAB, logprobs_tensors=output.logprobs_tensors
        )
        assert tokens == [[token for token in row if token != -1] for row in v1(requests)], "they change no token"
        spans = itertools.pairwise(found.cu_num_generated_tokens)
        for request, emitted, (begin, end) in zip(requests, tokens, spans, strict=True):
            assert end - begin == len(emitted)
            of_target = request.logits.log_softmax(-1)
            for position, token in enumerate(emitted):
                assert found.logprob_token_ids[begin + position][0] == token
                wanted = [of_target[position, token], *of_target[position].topk(2).values]
                assert found.logprobs[begin + position] == pytest.approx([float(one) for one in wanted], abs=1e-5)
                assert (
                    found.sampled_token_ranks[begin + position]
                    == (of_target[position] >= of_target[position, token]).sum()
                )
