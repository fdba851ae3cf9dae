"""The scheduler's drafts beside grammars: when it makes them, how long they are, and what it learns."""

import types

import numpy as np
import pytest
import xgrammar
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_aasd.config import Settings
from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import MAX_FAULTS, Faults
from vllm_aasd.engine.grammar.drafts import GrammarDrafts, TokenTexts
from vllm_aasd.engine.grammar.messages import InformedDraftTokenIds

LONGEST = 12
ANSWER = "The answer is not known to me at the moment."
WORKERS = [7, 8, 9]


@pytest.fixture(scope="module")
def target(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer), max_threads=1)
    ctx = compiler.compile_regex(r"The answer is (yes|not known to me at the moment)\.")
    return types.SimpleNamespace(tokenizer=tokenizer, ctx=ctx, answer=tokenizer.encode(ANSWER))


class Scheduler:
    """As much of vLLM's scheduler as is asked, with one request."""

    def __init__(self, target, settings=None, **sampling):
        self.target = target
        self.reasons = False
        self.faults = Faults()
        config = types.SimpleNamespace(
            speculative_config=types.SimpleNamespace(aasd=settings or Settings(), num_speculative_tokens=LONGEST),
            model_config=types.SimpleNamespace(
                get_vocab_size=lambda: len(target.tokenizer), model="no model", revision=None
            ),
        )
        bounds = lambda request, tokens: types.SimpleNamespace(grammar_start=int(self.reasons))
        manager = types.SimpleNamespace(tokenizer=target.tokenizer, _get_constraint_bounds=bounds)
        self.drafts = GrammarDrafts(config, manager, self.faults)
        matcher = xgrammar.GrammarMatcher(target.ctx)
        self.grammar = XgrammarGrammar(vocab_size=len(target.tokenizer), matcher=matcher, ctx=target.ctx)
        prompt = target.tokenizer.encode("What is the answer?")
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, **sampling})
        params._eos_token_id = target.tokenizer.eos_token_id
        self.request = types.SimpleNamespace(
            request_id="a",
            use_structured_output=True,
            is_prefill_chunk=False,
            is_finished=lambda: False,
            structured_output_request=types.SimpleNamespace(grammar=self.grammar),
            sampling_params=params,
            prompt_embeds=None,
            num_prompt_tokens=len(prompt),
            num_tokens=len(prompt),
            all_token_ids=prompt,
        )

    def emit(self, token_ids):
        assert self.grammar.accept_tokens("a", token_ids)
        self.request.all_token_ids = [*self.request.all_token_ids, *token_ids]
        self.request.num_tokens += len(token_ids)

    def steered(self, whole=WORKERS, prob=0.5, **informed):
        """The request's draft; the worker's is `whole`, which it has cut to the length of `WORKERS`."""
        survival = np.zeros((1, LONGEST), np.float32)
        survival[0, : len(whole)] = np.cumprod([prob] * len(whole))
        drafts = InformedDraftTokenIds(["a"], [whole[: len(WORKERS)]], [whole], survival, **informed)
        return self.drafts.steered(drafts, {"a": self.request}).draft_token_ids[0]

    def learn(self, scheduled, sampled):
        step = types.SimpleNamespace(scheduled_spec_decode_tokens={"a": scheduled})
        self.drafts.learn(step, types.SimpleNamespace(req_id_to_index={"a": 0}, sampled_token_ids=[sampled]))

    def counted(self):
        masks = self.drafts.counted(GrammarOutput(["a"], np.zeros((1, 1), np.int32)))
        counters = Counters("cpu")
        counters.add_grammar(masks.counts)
        found = {(value.name, *value.labels.values()): value.value for value in counters.read()}
        return masks.num_faults, {name: value for name, value in found.items() if "grammar" in name[0] and value}


def test_forced_text_replaces_the_workers_draft(target):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:1])
    assert scheduler.steered() == target.answer[1:3], "up to where there is a choice"
    scheduler.emit(target.answer[1:4])
    assert scheduler.steered() == [*target.answer[4:], target.tokenizer.eos_token_id], "and to the end"


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"enabled": False}, {}),
        ({"grammar": False}, {}),
        ({"allow_request_override": "stricter"}, {"extra_args": {"aasd_enabled": False}}),
        ({}, {"thinking_token_budget": 5}),
    ],
)
def test_requests_that_are_left_alone(target, settings, sampling):
    scheduler = Scheduler(target, Settings(**settings), **sampling)
    scheduler.emit(target.answer[:1])
    assert scheduler.steered() == WORKERS


def test_while_the_model_reasons_the_workers_draft_is_left(target):
    scheduler = Scheduler(target)
    scheduler.reasons = True
    scheduler.request.all_token_ids = [*scheduler.request.all_token_ids, *target.tokenizer.encode('"{["')]
    scheduler.request.num_tokens = len(scheduler.request.all_token_ids)
    assert scheduler.steered() == WORKERS
    scheduler.reasons = False
    scheduler.emit(target.answer[:1])
    assert scheduler.steered() == target.answer[1:3]


@pytest.mark.parametrize(("sampling", "longest"), [({"max_tokens": 3}, 1), ({"max_tokens": 2}, 0)])
def test_no_draft_goes_past_the_last_token(target, sampling, longest):
    scheduler = Scheduler(target, **sampling)
    scheduler.emit(target.answer[:1])
    assert scheduler.steered() == target.answer[1 : 1 + longest]


def test_the_time_of_a_step_decides_on_the_length(target):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:4])
    tokens = np.arange(99)
    # Tokens cost nothing; nothing up to five; each as much as the first.
    curves = np.ones(99), 1.0 + 4.0 * np.maximum(tokens - 5, 0), 0.05 + tokens
    lengths = [len(scheduler.steered(step_times=curve)) for curve in curves]
    assert lengths == [len(target.answer) - 3, 4, 0]


def test_what_became_of_drafts_is_counted(target):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:4])
    draft = scheduler.steered()
    scheduler.learn(draft, [*draft[:2], 0])
    num_faults, counts = scheduler.counted()
    assert num_faults == 0 and counts.pop(("grammar_seconds",)) > 0
    of = "forced"
    assert counts == {
        ("grammar_draft_tokens", of): len(draft),
        ("grammar_accepted_tokens", of): 2,
        ("grammar_rejected_tokens", of): 1,
    }
    scheduler.learn(draft, [*draft[:2], 0])
    assert scheduler.counted() == (0, {}), "each draft counts once"


def test_a_failure_costs_speculation_only(target, monkeypatch):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:1])

    def fail(*args):
        raise RuntimeError("the drafter is broken")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.drafts._steering, "draft", fail)
        assert scheduler.steered() == WORKERS
    assert scheduler.steered() == WORKERS, "the request stays without"
    assert scheduler.counted()[0] == 1 and scheduler.counted()[0] == 0, "and is told once"
    scheduler.drafts.forget(["a"])
    assert scheduler.steered() == target.answer[1:3]
    scheduler.faults.counts["grammar"] = MAX_FAULTS
    assert scheduler.steered() == WORKERS


def test_nothing_is_held_after_a_request_has_ended(target):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:1])
    scheduler.steered()
    scheduler.drafts.forget(["a", "b"])
    assert not scheduler.drafts._requests


@pytest.mark.parametrize("prob", [0.5, 0.95])
def test_the_workers_draft_is_followed_beyond_where_the_worker_has_cut_it(target, prob):
    scheduler = Scheduler(target)
    scheduler.emit(target.answer[:1])
    whole = target.answer[1:9]
    assert scheduler.steered(whole, prob) == [*target.answer[1:], target.tokenizer.eos_token_id]


def test_drafts_that_no_worker_tells_more_about_are_left(target):
    scheduler = Scheduler(target)
    drafts = DraftTokenIds(["a"], [WORKERS])
    assert scheduler.drafts.steered(drafts, {"a": scheduler.request}) is drafts


class SpacedTokenizer:
    """Its tokens are letters; it puts a space before a text, and drops one when it decodes."""

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in " " + text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids)).removeprefix(" ")


def test_texts_of_a_tokenizer_that_puts_a_space_before_them():
    texts = TokenTexts(SpacedTokenizer())
    assert texts.encode('"x') == [ord('"'), ord("x")]
    assert [texts.text_of(ord(sign)) for sign in ' "'] == [" ", '"']
