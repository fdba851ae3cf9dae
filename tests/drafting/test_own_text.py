"""What a prior learns from text of the target's own making, and how that text is made up."""

import types

import numpy as np
import pytest

from aasd_testing import fake_v1, fake_v2
from aasd_testing.chat_tokenizer import Tokenizer
from vllm_aasd.drafting.corpora import Corpora
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.drafting.own_text import Text, with_texts
from vllm_aasd.engine import prior_builder, shared_prior
from vllm_aasd.engine.chat_turns import Turns, turns
from vllm_aasd.kernels.draft import Prior

VOCAB_SIZE = 40


def text_of(token_ids, predictions):
    """A text whose predictions are ``{position: {token: probability}}``, of three at most."""
    table = np.full((len(token_ids), 7), -1, np.int32)
    table[:, 4:] = 0
    for position, predicted in predictions.items():
        table[position, 0] = token_ids[position]
        table[position, 1 : 1 + len(predicted)] = list(predicted)
        table[position, 4 : 4 + len(predicted)] = np.array(list(predicted.values()), np.float32).view(np.int32)
    return Text(np.array(token_ids, np.int32), table)


def random_texts(rng, count=20):
    texts = []
    for _ in range(count):
        token_ids = rng.integers(0, 8, rng.integers(3, 12)).tolist()
        predicted = {}
        for position in range(rng.integers(0, 3), len(token_ids) - 1):
            ids, probs = rng.permutation(VOCAB_SIZE)[:3].tolist(), rng.dirichlet(np.ones(4))[:3].tolist()
            predicted[position] = dict(zip(ids, probs, strict=True))
        texts.append(text_of(token_ids, predicted))
    return texts


def random_prior(rng):
    ids = np.stack([rng.permutation(VOCAB_SIZE)[:4] for _ in range(VOCAB_SIZE)]).astype(np.int32)
    probs = np.sort(rng.dirichlet(np.ones(5), VOCAB_SIZE)[:, :4].astype(np.float32))[:, ::-1].copy()
    ids[3, 2:], probs[3, 2:] = -1, 0
    return Prior(ids, probs)


def test_successors_are_those_of_a_plain_sum():
    rng = np.random.default_rng(0)
    prior, texts = random_prior(rng), random_texts(rng)
    assert with_texts(prior, []) is prior
    found = with_texts(prior, texts)
    unseen = np.setdiff1d(np.arange(VOCAB_SIZE), [row[0] for text in texts for row in text.table])
    np.testing.assert_array_equal(found.ids[unseen], prior.ids[unseen])
    np.testing.assert_array_equal(found.probs[unseen], prior.probs[unseen])
    for token in range(VOCAB_SIZE):
        observed = [(prior.ids[token], prior.probs[token])] + [
            (row[1:4], row[4:].view(np.float32)) for text in texts for row in text.table if row[0] == token
        ]
        sums = {}
        for ids, probs in observed:
            for successor, prob in zip(ids.tolist(), probs.tolist(), strict=True):
                if successor >= 0:
                    sums[successor] = sums.get(successor, 0) + prob / len(observed)
        best = sorted(sums.items(), key=lambda entry: -entry[1])[:4]
        kept = [of for of in found.ids[token].tolist() if of >= 0]
        assert kept == [successor for successor, _ in best]
        assert found.probs[token, : len(kept)].tolist() == pytest.approx([prob for _, prob in best], rel=1e-5)
        assert not found.probs[token, len(kept) :].any()
    assert (found.probs.sum(axis=1) <= 1 + 1e-6).all()


def test_texts_are_kept_with_an_end_after_each():
    texts = [text_of([1, 2, 3], {0: {2: 1.0}}), text_of([4, 5], {0: {5: 1.0}})]
    assert with_texts(random_prior(np.random.default_rng(2)), texts).texts.tolist() == [1, 2, 3, -1, 4, 5, -1]


def test_a_prior_s_texts_are_drafted_from():
    texts = KnownTexts(0, 2, Corpora(np.array([9, 5, 6, 7, 8, -1, 1, 2, -1], np.int32)))
    drafter = Drafter(VOCAB_SIZE, 2, 0.0, texts=texts)
    drafted, survival = drafter.draft("r", np.array([3, 5, 6], np.int32), NO_ALIGNMENT, 2)
    assert drafted.tolist() == [7, 8]
    assert 0 < survival[1] < survival[0] < 1
    drafter.clear_memory()
    assert drafter.draft("s", np.array([3, 5, 6], np.int32), NO_ALIGNMENT, 2)[0].tolist() == [7, 8]


NEW = [5, 6]
"""A prompt in which nothing comes again."""


@pytest.fixture
def all_knowing(monkeypatch):
    """The adapters find a prior whose text is what the fake target answers."""
    texts = [text_of([*NEW, *fake_v2.target_alone(NEW)], {0: {1: 1.0}})]
    nothing = Prior(np.full((fake_v2.VOCAB, 1), -1, np.int32), np.zeros((fake_v2.VOCAB, 1), np.float32))
    monkeypatch.setattr(shared_prior, "load_prior", lambda model: with_texts(nothing, texts)._replace(ids=nothing.ids))


@pytest.mark.parametrize("has_prior", [True, False])
def test_the_runner_drafts_from_a_prior_s_text(all_knowing, has_prior):
    v1 = fake_v1.FakeRunner(
        {"a": NEW}, verification="strict", draft_length=fake_v2.WIDTH, prior=60 if has_prior else "off"
    )
    for _ in range(2):
        v1.step()
    assert v1.num_accepted == (fake_v2.WIDTH if has_prior else 0)
    assert v1.tokens["a"] == NEW + fake_v2.target_alone(NEW)[: len(v1.tokens["a"]) - len(NEW)]


def chat(text, answering):
    return f"S?U:{text}.\n" + "A:" * answering


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (chat, Turns("S?U:", ".\n", "A:")),
        (lambda text, answer: text, None),
        (lambda text, answer: "x" * answer + text, None),
        (lambda text, answer: "A:" * answer, None),
        (lambda *_: 1 / 0, None),
    ],
)
def test_a_template_is_taken_apart_around_a_question_or_is_none(template, wanted):
    assert turns(Tokenizer(template)) == wanted


class Target:
    """Stands for vLLM: continues each prompt with "ab", and ends a question; predicts what comes, and "z"."""

    def __init__(self, tokenizer, max_model_len=100):
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=max_model_len))
        self.prompts, self.params = [], []
        self._tokenizer = tokenizer

    def get_tokenizer(self):
        return self._tokenizer

    def generate(self, prompts, params, use_tqdm):
        self.prompts += ["".join(map(chr, prompt["prompt_token_ids"])) for prompt in prompts]
        self.params += params
        outputs = []
        for prompt, limits in zip(prompts, params, strict=True):
            is_question = prompt["prompt_token_ids"][-2:] == [ord("U"), ord(":")]
            continued = [ord(letter) for letter in ("ab." if is_question else "ab")][: limits.max_tokens]
            logprobs = [
                {ord("z"): types.SimpleNamespace(logprob=np.log(0.25)), of: types.SimpleNamespace(logprob=np.log(0.75))}
                for of in continued
            ]
            output = types.SimpleNamespace(token_ids=continued, logprobs=logprobs)
            outputs.append(types.SimpleNamespace(outputs=[output]))
        return outputs


def predicted_in(text):
    """By position, the token there and what was predicted behind it."""
    return {
        position: (chr(row[0]), "".join(map(chr, row[1:3])), row[3:5].view(np.float32).tolist())
        for position, row in enumerate(text.table)
        if row[0] >= 0
    }


def test_questions_are_made_up_and_answered(capsys):
    target = Target(Tokenizer(chat))
    texts = prior_builder.conversations(target, 300, 2)
    assert len(texts) == 600 and capsys.readouterr().out.endswith("300 of 300 conversations\n")
    assert set(target.prompts) == {"S?U:", "S?U:ab.\nA:"} and len(target.prompts) == 600
    assert {(params.temperature, params.logprobs) for params in target.params} == {(1.0, 2)}
    question, answer = texts[0], texts[256]
    assert "".join(map(chr, question.token_ids)) == "S?U:ab."
    likely = pytest.approx([0.75, 0.25])
    assert predicted_in(question) == {3: (":", "az", likely), 4: ("a", "bz", likely), 5: ("b", ".z", likely)}
    assert "".join(map(chr, answer.token_ids)) == "S?U:ab.\nA:ab"
    assert predicted_in(answer) == {9: (":", "az", likely), 10: ("a", "bz", likely)}


def test_a_question_that_is_cut_off_is_answered_as_it_is():
    target = Target(Tokenizer(chat), max_model_len=6)
    prior_builder.conversations(target, 1, 2)
    # Two tokens are left for the question, and the answer sees the end of it.
    assert [params.max_tokens for params in target.params] == [2, 1]
    assert target.prompts[1] == "b.\nA:"


@pytest.mark.parametrize(("bos", "eos", "beginning"), [(1, 2, 1), (None, 2, 2), (None, None, 0), (0, 2, 0)])
def test_without_a_template_texts_begin_where_texts_begin(bos, eos, beginning):
    tokenizer = Tokenizer(lambda *_: 1 / 0)
    tokenizer.bos_token_id, tokenizer.eos_token_id = bos, eos
    target = Target(tokenizer)
    (text,) = prior_builder.conversations(target, 1, 2)
    assert target.prompts == [chr(beginning)]
    assert text.token_ids.tolist() == [beginning, ord("a"), ord("b")]
