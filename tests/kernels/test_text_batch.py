"""Known text on the device, interpreted, against its reference: step by step of requests that come, emit and go."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from aasd_testing.texts import copy_texts, texts_of
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS
from vllm_aasd.drafting.known_text import PROMPT_TAIL, prior_reliability
from vllm_aasd.kernels.draft import reference as draft_reference
from vllm_aasd.kernels.draft.batch import MAX_EXCLUDED, DraftBatch, draft_workspace
from vllm_aasd.kernels.text import (
    ANSWERS,
    CORPUS,
    MAX_CORPORA,
    MAX_COUNT,
    NUM_CELLS,
    PAGE_SIZE,
    PLACE_BITS,
    PREDICTION,
    new_index,
)
from vllm_aasd.kernels.text import batch as text_batch
from vllm_aasd.kernels.text import batch_reference as reference
from vllm_aasd.kernels.text import triton as text_triton
from vllm_aasd.kernels.text.batch import (
    ANSWERS_COLUMN,
    KINDS,
    PREDICTION_OVERLAP,
    TICKET,
    append_predictions,
    learn_and_append,
    new_texts,
    text_bytes,
)
from vllm_aasd.kernels.text.reference import append

MAX_LEN, MAX_MATCHES = 320, 4
NAMES = {"text": "vllm_aasd.kernels.text.triton", "draft": "vllm_aasd.kernels.draft.triton"}


class Requests:
    """A runner's state, which two implementations share, and what each of them keeps of text.

    Args:
        interpreter: runs the kernels; the other implementation is the reference.
    """

    def __init__(self, interpreter, texts, num_spec_tokens=4, vocab_size=30):
        self._interpreter = interpreter
        self._vocab_size, self._num_spec_tokens = vocab_size, num_spec_tokens
        max_num_reqs = len(texts.slots)
        self.all_token_ids = torch.zeros(max_num_reqs, MAX_LEN, dtype=torch.int32)
        self.total_len = torch.zeros(max_num_reqs, dtype=torch.int32)
        self.kernels, self.reference = texts, texts._replace(**copies(texts))
        self._num_tickets = 0
        self.drafts = torch.zeros(max_num_reqs, num_spec_tokens, dtype=torch.int64)
        self.num_drafts = torch.zeros(max_num_reqs, dtype=torch.int32)

    def enter(self, slot, prompt, answers=-1, prediction=-1, corpora=(-1,) * MAX_CORPORA):
        """A request takes a slot, whoever was there."""
        self._num_tickets += 1
        for texts in (self.kernels, self.reference):
            texts.slots[slot] = torch.tensor([*corpora, answers, prediction, self._num_tickets])
        self.all_token_ids[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.total_len[slot] = len(prompt)
        self.num_drafts[slot] = 0

    def emit(self, slot, token_ids):
        """Tokens of a request's answer."""
        start, end = int(self.total_len[slot]), int(self.total_len[slot]) + len(token_ids)
        self.all_token_ids[slot, start:end] = torch.tensor(token_ids, dtype=torch.int32)
        self.total_len[slot] = end

    def context(self, slot):
        """The tokens of a request."""
        return self.all_token_ids[slot, : int(self.total_len[slot])].tolist()

    def append(self, slots, num_sampled=None):
        """The step's `learn_and_append`; rows that have sampled nothing yet are left for later."""
        num_sampled = torch.tensor([1] * len(slots) if num_sampled is None else num_sampled, dtype=torch.int32)
        given = self.all_token_ids, self.total_len, torch.tensor(slots, dtype=torch.int64), num_sampled, PROMPT_TAIL
        self._run("learn_and_append", *given)

    def predict(self, token_ids, pieces):
        """`append_predictions`."""
        given = torch.tensor(token_ids, dtype=torch.int32), torch.tensor(pieces, dtype=torch.int64)
        self._run("append_predictions", *given)

    def _run(self, name, *given):
        # Left over from other steps: it must not be read.
        self.kernels.spans.fill_(1)
        _, after = self._interpreter.run(f"vllm_aasd.kernels.text.triton:{name}", self.kernels, *given)
        copy_texts(self.kernels, after[0])
        getattr(reference, name)(self.reference, *given)
        self.check()

    def draft(self, slots, limits=None):
        """Draft for slots, by both; what is drafted stands in `drafts` and `num_drafts` afterwards, by slot."""
        limits = [self._num_spec_tokens] * len(slots) if limits is None else limits
        outcomes = []
        for texts in (self.kernels, self.reference):
            batch = self._draft_batch(texts, slots, limits)
            if texts is self.kernels:
                _, (after,) = self._interpreter.run("vllm_aasd.kernels.draft.triton:draft_batch", batch)
                copy_texts(texts, after.texts)
            else:
                draft_reference.draft_batch(batch)
                after = batch
            outcomes.append((after.draft_token_ids, after.num_drafts[slots], after.survival[slots]))
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        self.check()
        self.drafts[slots], self.num_drafts[slots] = outcomes[1][:2]
        return [ids[:count].tolist() for ids, count in zip(*outcomes[1][:2], strict=True)]

    def _draft_batch(self, texts, slots, limits):
        num_reqs, none = len(slots), torch.zeros((0, 0), dtype=torch.int32)
        max_len = self.total_len.clone()
        max_len[slots] += 1 + torch.tensor(limits, dtype=torch.int32)
        return DraftBatch(
            all_token_ids=self.all_token_ids,
            total_len=self.total_len,
            idx_mapping=torch.tensor(slots, dtype=torch.int64),
            table=torch.zeros((0, 1), dtype=torch.int32),
            block_tables=torch.zeros((len(self.total_len), 1), dtype=torch.int32),
            block_size=1,
            theta=torch.from_numpy(DEFAULT_WEIGHTS.theta),
            alignment=torch.from_numpy(DEFAULT_WEIGHTS.alignment),
            no_alignment_discount=torch.tensor([DEFAULT_WEIGHTS.no_alignment_discount]),
            prior_ids=none,
            prior_probs=none.float(),
            vocab_size=self._vocab_size,
            max_matches=MAX_MATCHES,
            min_survival=0.05,
            texts=texts,
            max_len=max_len,
            num_sampled=torch.ones(num_reqs, dtype=torch.int32),
            excluded=torch.full((MAX_EXCLUDED,), -1, dtype=torch.int32),
            longest=self._num_spec_tokens,
            workspace=draft_workspace(
                num_reqs, self.all_token_ids.shape[1], len(DEFAULT_WEIGHTS.theta), MAX_MATCHES, 0, 0, "cpu"
            ),
            draft_token_ids=torch.zeros((num_reqs, self._num_spec_tokens), dtype=torch.int64),
            num_drafts=torch.zeros(len(self.total_len), dtype=torch.int32),
            survival=torch.zeros((len(self.total_len), self._num_spec_tokens)),
            lookups=torch.zeros(3, dtype=torch.int64),
        )

    def check(self):
        """Both keep the same: all but what a draft left beyond what it looked up, and the kernels' scratch."""
        for name, ours, theirs in zip(self.kernels._fields, self.kernels, self.reference, strict=True):
            if name not in ("spans", "num_pages", "cells", "found_tokens"):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        for slot, (_, num_looked_up) in enumerate(self.kernels.looked_up.tolist()):
            cells = self.kernels.cells[slot, :num_looked_up]
            assert torch.equal(cells, self.reference.cells[slot, :num_looked_up])
            found = [texts.found_tokens[slot, :num_looked_up][cells >= 0] for texts in (self.kernels, self.reference)]
            assert torch.equal(*found)


def copies(texts):
    return {name: value.clone() for name, value in texts._asdict().items() if isinstance(value, torch.Tensor)}


def corpora_of(*texts, spare_pages=0):
    """An index of texts, the first of which is in namespace 0, and so on."""
    index = new_index(sum(-(-len(text) // PAGE_SIZE) for text in texts) + spare_pages)
    for namespace, text in enumerate(texts):
        append(index, namespace, -1, 0, np.array(text, np.int32), 0, len(text))
    return index


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_requests_that_come_and_go(interpreter, seed):
    """In rows of any order, some of them without tokens yet, in so few pages that they take each other's places."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(30, size=200).tolist()
    corpora = corpora_of(answer[50:150], answer[:20], answer[100:180], answer[:60], spare_pages=3)
    requests = Requests(interpreter, texts_of(4, 3, 13, corpora), num_spec_tokens=3)
    num_found = num_accepted = 0
    for _ in range(60 if seed else 45):
        slots = rng.permutation(4)[: rng.integers(1, 5)].tolist()
        sampled = []
        for slot in slots:
            length = int(requests.total_len[slot])
            if length == 0 or length > MAX_LEN - 90 or rng.random() < 0.1:
                start = int(rng.integers(150))
                namespaces = rng.choice([-1, 0, 7, 2**62 + 1]), rng.choice([-1, -9])
                corpora = [int(number) if rng.random() < 0.5 else -1 for number in rng.permutation(6)[:MAX_CORPORA]]
                prompt = answer[start : start + int(rng.integers(1, 50))]
                requests.enter(slot, prompt, *map(int, namespaces), corpora)
                sampled.append(0)
                continue
            drafted = requests.drafts[slot, : int(requests.num_drafts[slot])].tolist()
            kept = int(rng.integers(len(drafted) + 1))
            emitted = [*drafted[:kept], int(rng.integers(30))]
            if rng.random() < 0.25:
                # More than a step takes: after steps that failed.
                emitted = answer[: int(rng.integers(60, 90))]
            requests.emit(slot, emitted)
            sampled.append(len(emitted))
            num_accepted += kept
        requests.append(slots, sampled)
        requests.draft(slots, [3 * (count > 0) for count in sampled])
        num_found += int((requests.reference.cells >= 0).sum())
    assert int(requests.kernels.begun) > 20, "every page must have changed hands"
    assert num_found > 50 and num_accepted > 5 and int(requests.kernels.found.sum()) > 30


def test_an_answer_is_drafted_by_whoever_shares_its_namespace_and_by_no_other(interpreter):
    requests = Requests(interpreter, texts_of(4, 4, 16))
    answer = np.random.default_rng(0).permutation(30).tolist()
    requests.enter(0, [1, 2, 3], answers=5)
    for token in answer:
        requests.emit(0, [token])
        requests.append([0])
    for slot, namespace in ((1, 5), (2, 6), (3, -1)):
        requests.enter(slot, [1, 2, 3], answers=namespace)
        requests.emit(slot, answer[:10])
        requests.append([slot])
    # The request that has just written it knows what comes next from its own context alone: nothing.
    assert requests.draft([1, 2, 3, 0]) == [answer[10:14], [], [], []]
    # Whoever takes its place is another.
    requests.enter(1, answer[:9], answers=6)
    requests.emit(1, answer[9:10])
    requests.append([1])
    assert requests.draft([1]) == [answer[10:11]] or requests.draft([1]) == [[]]


def test_rows_that_begin_pages_in_one_step_do_so_in_their_order(interpreter):
    """More of them than pages, and than a round of the kernel takes."""
    num_reqs = 80
    requests = Requests(interpreter, texts_of(num_reqs, 4, 16))
    order = np.random.default_rng(0).permutation(num_reqs).tolist()
    for slot in range(num_reqs):
        requests.enter(slot, [slot % 30, 2], answers=0)
        requests.emit(slot, [3])
    requests.append(order)
    assert requests.kernels.documents[order, 3].tolist() == [
        (count // 16 << PLACE_BITS) + count % 16 for count in range(num_reqs)
    ]
    assert requests.kernels.pages[:, 0].tolist() == [(4 << PLACE_BITS) + place for place in range(16)]


def test_predictions_come_in_pieces(interpreter):
    requests = Requests(interpreter, texts_of(2, 4, 32))
    text = np.random.default_rng(0).integers(30, size=600).tolist()
    requests.enter(0, text[:20], prediction=-5)
    requests.enter(1, text[200:220])
    length = 200
    for begin in range(0, len(text), length - PREDICTION_OVERLAP):
        before = min(begin, PREDICTION_OVERLAP)
        row = text[begin - before : begin + length - PREDICTION_OVERLAP]
        padding = [0] * (length - len(row))
        requests.predict([row + padding, [1] * length], [[0, before, len(row)], [-1, 0, 0]])
    assert int(requests.kernels.begun) == -(-600 // PAGE_SIZE)
    for slot in (0, 1):
        requests.emit(slot, text[20:23])
    requests.append([0, 1])
    assert requests.draft([0, 1])[0] == text[23:27]
    # Across the edge of two pieces, as in one.
    whole = new_index(32)
    append(whole, -5, -1, 0, np.array(text, np.int32), 0, len(text))
    for one, other in zip(reference.indexes_of(requests.reference)[0], whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_never_helps_is_soon_not_drafted(interpreter):
    """Counts are added up over the rows of a step, and halved before they grow beyond bounds."""
    requests = Requests(interpreter, texts_of(8, 2, 16), num_spec_tokens=2)
    requests.enter(0, [1, 2, 3], answers=5)
    requests.emit(0, [4, 5, 6, 7, 8, 9, 10, 11])
    requests.append([0])
    slots = list(range(1, 8))

    def drafted(truth):
        for slot in slots:
            # They read what the first has written, and write nothing themselves.
            requests.enter(slot, [20 + slot, 4, 5], prediction=5)
            requests.emit(slot, [6])
        requests.append(slots)
        drafts = requests.draft(slots)
        for slot in slots:
            requests.emit(slot, [truth])
        requests.append(slots)
        return drafts

    def count(num_found, num_right):
        for texts in (requests.kernels, requests.reference):
            texts.found[cell], texts.right[cell] = num_found, num_right

    assert drafted(12) == [[7, 8]] * 7
    found, right = requests.kernels.found, requests.kernels.right
    cell = int(found.argmax())
    assert found[cell] == 7 and right.sum() == 0
    count(300, 0)
    assert drafted(12) == [[7, 8]] * 7
    assert drafted(12) == [[]] * 7
    count(4 * MAX_COUNT + 1, 400)
    drafted(7)
    assert found[cell] == MAX_COUNT // 2 + 7 and right[cell] == 400 // 8 + 7


def test_cleared_text_is_gone_and_corpora_stay(interpreter):
    requests = Requests(interpreter, texts_of(2, 4, 16, corpora_of([20, 21, 22, 23, 24, 25, 26])))
    requests.enter(0, [1, 2, 3], answers=5)
    requests.emit(0, [4, 5, 6, 7, 8, 9])
    requests.append([0])

    def drafted(context):
        requests.enter(1, context[:-1], answers=5, corpora=(0, -1, -1, -1))
        requests.emit(1, context[-1:])
        # No row of this step adds to the index.
        return requests.draft([1])[0]

    assert drafted([3, 4, 5]) == [6, 7, 8, 9] and drafted([20, 21, 22]) == [23, 24, 25, 26]
    for texts in (requests.kernels, requests.reference):
        texts.clear()
    assert drafted([3, 4, 5]) == [] and drafted([20, 21, 22]) == [23, 24, 25, 26]
    # The document goes on with its next page.
    requests.emit(0, list(range(30)) * 2)
    requests.append([0])
    requests.emit(0, [11] * 30)
    requests.append([0])


def test_ids_outside_the_vocabulary_are_never_drafted(interpreter):
    requests = Requests(interpreter, texts_of(2, 4, 16), vocab_size=30)
    requests.enter(0, [1, 2, 3], answers=5)
    requests.emit(0, [4, 5, 6, 900, 7])
    requests.append([0])
    requests.enter(1, [3, 4], answers=5)
    requests.emit(1, [5])
    requests.append([1])
    assert requests.draft([1]) == [[6]]


def test_bytes_are_those_that_are_taken():
    for sizes in ((3, 4, 16, 0), (300, 16, 1024, 64), (1024, 8, 0, 0)):
        corpora = corpora_of([1] * PAGE_SIZE * sizes[3]) if sizes[3] else corpora_of()
        texts = new_texts(*sizes[:3], corpora, prior_reliability(), "cpu")
        taken = sum(value.nbytes for value in texts if isinstance(value, torch.Tensor))
        assert text_bytes(*sizes) == taken


def test_cpu_tensors_get_the_reference_and_gpu_tensors_the_triton_path(interpreter):
    assert text_batch._implementation("cpu") is reference
    assert text_batch._implementation("cuda") is text_triton
    assert interpreter.call("aasd_testing.interpreter:backend_name", "text.batch") == "vllm_aasd.kernels.text.triton"
    code = "import sys, vllm_aasd.kernels.text.batch; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("all_token_ids", torch.zeros(4, 16), "all_token_ids has dtype torch.float32"),
        ("all_token_ids", torch.zeros(3, 16, dtype=torch.int32), r"all_token_ids has shape \(3, 16\), expected 4"),
        ("total_len", torch.zeros(3, dtype=torch.int32), r"total_len has shape \(3,\), expected \(4,\)"),
        ("idx_mapping", torch.zeros(2), "idx_mapping has dtype"),
        ("idx_mapping", torch.zeros(5, dtype=torch.int64), r"num_sampled has shape \(2,\), expected \(5,\)"),
        ("num_sampled", torch.zeros(2, dtype=torch.int64), "num_sampled has dtype torch.int64"),
    ],
)
def test_a_wrong_argument_is_named(name, value, message):
    int32 = {"dtype": torch.int32}
    given = {
        "all_token_ids": torch.zeros(4, 16, **int32),
        "total_len": torch.zeros(4, **int32),
        "idx_mapping": torch.zeros(2, dtype=torch.int64),
        "num_sampled": torch.zeros(2, **int32),
    }
    with pytest.raises(ValueError, match=message):
        learn_and_append(texts_of(4, 4, 16), **{**given, name: value}, prompt_tail=PROMPT_TAIL)
    pieces = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"pieces has shape \(2, 2\), expected \(2, 3\)"):
        append_predictions(texts_of(4, 4, 16), torch.zeros(2, 8, **int32), pieces)


def test_columns_of_corpora_come_first():
    assert KINDS[:ANSWERS_COLUMN] == (CORPUS,) * MAX_CORPORA
    assert KINDS[ANSWERS_COLUMN:TICKET] == (ANSWERS, PREDICTION)
    assert [ANSWERS, PREDICTION] == [CORPUS + 1, CORPUS + 2]
    assert NUM_CELLS <= 1024
