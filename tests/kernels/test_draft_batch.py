"""The device-resident drafter, interpreted, against its reference and against the CPU drafter."""

import inspect
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from aasd_testing.drafts import assert_same_drafts
from aasd_testing.prompts import real_prompts
from aasd_testing.texts import copy_texts, no_texts
from vllm_aasd.drafting.drafter import (
    DEFAULT_WEIGHTS,
    MAX_MATCHES,
    MAX_NGRAM_SIZE,
    NO_ALIGNMENT,
    AlignmentView,
    Drafter,
)
from vllm_aasd.gpu_check.inputs import POISON_COUNT, POISON_ID, batch_of, random_contexts
from vllm_aasd.kernels.draft import MixtureWeights, Prior
from vllm_aasd.kernels.draft import batch as draft_batch_op
from vllm_aasd.kernels.draft import reference as draft_reference
from vllm_aasd.kernels.draft import triton as draft_triton
from vllm_aasd.kernels.draft.batch import PART, WINDOW, draft_batch
from vllm_aasd.kernels.draft.triton import TILE

# For scores worked out by hand.
ROUND = MixtureWeights(
    theta=np.array([2, 1.5, 1, 1, 1, 1], np.float32),
    alignment=np.array([0.7, 0.5, 0.4, 0.3, 0.25, 0.25], np.float32),
    no_alignment_discount=np.float32(1),
)


def interpreted(interpreter):
    """The Triton path as an op: what it writes there is written here."""

    def op(batch):
        _, (after,) = interpreter.run("vllm_aasd.kernels.draft.triton:draft_batch", batch)
        for ours, theirs in zip(batch[-5:], after[-5:], strict=True):
            ours.copy_(theirs)
        copy_texts(batch.texts, after.texts)

    return op


def assert_equal(got, want):
    for name, ours, references in zip(("draft_token_ids", "num_drafts", "survival"), got, want, strict=True):
        # The same bits: every sum is taken in the same order.
        torch.testing.assert_close(ours, references, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def check(interpreter, batch, workspace=None):
    """Compare the kernel with the reference, and return what they draft."""
    looked_up, want_looked_up = torch.full((2, 3), 100)
    got = batch.drafts(interpreted(interpreter), workspace, looked_up)
    want = batch.drafts(draft_reference.draft_batch, lookups=want_looked_up)
    assert looked_up.tolist() == want_looked_up.tolist()
    assert (want[0] != POISON_ID).all() and (want[1] != POISON_COUNT).all() and not want[2].isnan().any()
    assert_equal(got, want)
    return got


GRID = [
    pytest.param(*case, marks=[] if short else [pytest.mark.long])
    for case, short in [
        ((num_spec_tokens, top_k, prior_top_k, max_matches), (i + j + 2 * p + m) % 4 == 0)
        for i, num_spec_tokens in enumerate((1, 5, 8))
        for j, top_k in enumerate((0, 2, 4))
        for p, prior_top_k in enumerate((0, 3))
        for m, max_matches in enumerate((1, 5, 32))
    ]
]


@pytest.mark.parametrize(("num_spec_tokens", "top_k", "prior_top_k", "max_matches"), GRID)
def test_kernel_drafts_what_the_twin_drafts(interpreter, num_spec_tokens, top_k, prior_top_k, max_matches):
    contexts = random_contexts((0, 1, 2, 60), 3) + random_contexts((90,), 9)
    batch = batch_of(contexts, 9, num_spec_tokens, top_k, prior_top_k, max_matches)
    _, num_drafts, _ = check(interpreter, batch)
    assert num_drafts[0] == 0 and num_drafts.max() == num_spec_tokens


@pytest.mark.parametrize("length", [TILE, TILE + 1, TILE + 2, 2 * TILE + 1, 3 * TILE - 1])
def test_lists_go_on_from_tile_to_tile(interpreter, length):
    # About 6 matches of one token in a tile: the lists of low orders fill over several tiles, those of high
    # orders hold the suffix's copies, one of which lies across the edge of two tiles.
    context = random_contexts((length,), 160, seed=length)[0]
    suffix = context[-5:]
    for start in (0, 100, min(TILE - 3, length - 11), length // 2):
        context[start : start + 5] = suffix
    _, num_drafts, _ = check(interpreter, batch_of([context], 160, 3, 2, 0, max_matches=16, block_size=16))
    assert num_drafts.tolist() == [3]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    contexts=st.lists(
        st.one_of(
            st.lists(st.integers(0, 2), max_size=40),
            st.lists(st.integers(0, 9), max_size=40),
            # Periodic: long matches, drafts that leave the context's end.
            st.builds(
                lambda period, times: period * times,
                st.lists(st.integers(0, 4), max_size=9),
                st.integers(1, 5),
            ),
        ),
        min_size=1,
        max_size=2,
    ),
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 3),
    prior_top_k=st.integers(0, 5),
    max_matches=st.integers(1, 7),
    min_survival=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_any_contexts(interpreter, contexts, seed, top_k, prior_top_k, max_matches, min_survival):
    sizes = 3, top_k, prior_top_k, max_matches, min_survival
    check(interpreter, batch_of(contexts, 10, *sizes, seed=seed))


def test_rows_do_not_affect_each_other(interpreter):
    batch = batch_of(random_contexts((40, 0, 1, 60), 3), 3, 3, 2, 3)
    together = check(interpreter, batch)
    for row in range(len(batch.idx_mapping)):
        alone = batch.row(row).drafts(interpreted(interpreter))
        assert_equal(alone, [output[row : row + 1] for output in together])


def test_rows_keep_to_their_part_of_the_workspace(interpreter):
    batch = batch_of(random_contexts((80, 80, 80), 3), 3, 3, 4, 3)
    batch.limit(0, 3, 0)
    workspace = batch.workspace()
    before = workspace.clone()
    batch.drafts(interpreted(interpreter), workspace)
    changed = (workspace != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_row_without_a_slot_drafts_nothing(interpreter, dtype):
    batch = batch_of(random_contexts((30, 30, 30), 3), 3, 2)
    batch = replace(batch, idx_mapping=batch.idx_mapping.to(dtype))
    batch.idx_mapping[1] = -1
    draft_token_ids, num_drafts, survival = check(interpreter, batch)
    assert num_drafts.tolist() == [2, 0, 2]
    assert draft_token_ids[1].tolist() == [0, 0] and survival[1].tolist() == [0, 0]


def test_limits_and_what_stands_past_them(interpreter):
    context = [5, 6, 7, 8, 9, 1, 2, 5, 6]
    batch = batch_of([context] * 5, 10, 3)
    batch.limit(0, 1, 3, 9, -1)
    draft_token_ids, num_drafts, survival = check(interpreter, batch)
    assert num_drafts.tolist() == [0, 1, 3, 3, 0]
    full = [7, 8, 9]
    assert draft_token_ids.tolist() == [[6, 6, 6], [7, 6, 6], full, full, [6, 6, 6]]
    assert (survival[0] == 0).all() and survival[1, 0] > 0 and (survival[1, 1:] == 0).all()


def test_a_row_that_has_emitted_nothing_drafts_nothing(interpreter):
    batch = batch_of([[5, 6, 7, 5, 6]] * 2, 10, 1)
    batch.num_sampled[0] = 0
    assert check(interpreter, batch)[1].tolist() == [0, 1]


def test_a_draft_ends_before_what_is_excluded(interpreter):
    batch = batch_of([[5, 6, 7, 8, 9, 1, 2, 5, 6]], 10, 3)
    batch.excluded[-1] = 8
    draft_token_ids, num_drafts, survival = check(interpreter, batch)
    assert num_drafts.tolist() == [1] and draft_token_ids.tolist() == [[7, 6, 6]]
    assert survival[0, 0] > 0 and survival[0, 1:].tolist() == [0, 0]


def test_the_scores_of_an_example_worked_out_by_hand(interpreter):
    # The last token 1 stood at positions 0 and 3, before 2 and 4; nothing longer matches. theta_1 is 2, so
    # w = 2 / 4 and each match has a share of 1/4; the entry at position 3 is fresh and takes 0.7 of it.
    batch = batch_of([[1, 2, 3, 1, 4, 1]], 10, 1, top_k=1, prior_top_k=2, block_size=2, weights=ROUND)
    slot = int(batch.idx_mapping[0])
    batch.table[:, 0] = 8
    at_3 = int(batch.block_tables[slot, 1]) * 2 + 1
    batch.table[at_3] = torch.tensor([1, 2, int(np.float32(0.5).view(np.int32))])
    batch.prior_ids[1] = torch.tensor([4, 7])
    batch.prior_probs[1] = torch.tensor([0.1, 0.5])
    # 2: 1/4 + 1/4 * 0.7 * 0.5 = 0.3375. 4: 1/4 * 0.3 + 1/2 * 0.1 = 0.125. 7: 1/2 * 0.5 = 0.25.
    draft_token_ids, _, survival = check(interpreter, batch)
    assert draft_token_ids.tolist() == [[2]]
    assert survival.item() == pytest.approx(0.3375, rel=1e-6)
    batch.table[at_3, 0] = 3
    # Stale now: 2 has 1/4, 4 has 1/4 + 1/2 * 0.1.
    draft_token_ids, _, survival = check(interpreter, batch)
    assert draft_token_ids.tolist() == [[4]]
    assert survival.item() == pytest.approx(0.3, rel=1e-6)
    batch.no_alignment_discount[0] = 2
    # No match has a stored distribution, so w = 2 / (2 + 2 * 2), and 7 has 2/3 * 0.5 from the prior.
    draft_token_ids, _, survival = check(interpreter, batch)
    assert draft_token_ids.tolist() == [[7]]
    assert survival.item() == pytest.approx(1 / 3, rel=1e-6)
    batch.table[at_3, 0] = 1
    # One of two has one: w = 2 / (2 + 2 * 1.5). 7: 3/5 * 0.5. 2: 1/5 + 1/5 * 0.7 * 0.5 = 0.27.
    draft_token_ids, _, survival = check(interpreter, batch)
    assert draft_token_ids.tolist() == [[7]]
    assert survival.item() == pytest.approx(0.3, rel=1e-6)


def test_of_equal_scores_the_latest_position_wins(interpreter):
    batch = batch_of([[1, 2, 0, 1, 3, 0, 1, 4, 0, 1]], 10, 1)
    assert check(interpreter, batch)[0].tolist() == [[4]]


def test_of_equal_scores_the_latest_position_wins_among_many(interpreter):
    # 300 matches of one token, each before another one: more candidates than are scored at once.
    pairs = [token for successor in range(2, 302) for token in (1, successor)]
    batch = batch_of([[*pairs, 1]], 400, 1, prior_top_k=1, max_matches=512)
    batch.prior_ids[1], batch.prior_probs[1] = 350, 0.1
    assert check(interpreter, batch)[0].tolist() == [[301]]
    # 2 / 302 of the weight is the prior's, 1 / 302 that of each match.
    batch.prior_probs[1] = 0.6
    assert check(interpreter, batch)[0].tolist() == [[350]], "the last candidate of all can win"


def test_stale_predictions_do_not_count(interpreter):
    contexts = random_contexts((50, 70), 4)
    stale = batch_of(contexts, 4, 4, top_k=3, stale_share=1.1)
    without = batch_of(contexts, 4, 4)
    assert_equal(check(interpreter, stale), without.drafts(interpreted(interpreter)))
    fresh = batch_of(contexts, 4, 4, top_k=3, stale_share=0)
    assert not torch.equal(check(interpreter, fresh)[2], check(interpreter, stale)[2])


@pytest.mark.parametrize("block", [-1, 10**6, 2**31 - 1])
def test_blocks_outside_the_table_hold_no_prediction(interpreter, block):
    contexts = random_contexts((50,), 4)
    outside = batch_of(contexts, 4, 3, top_k=2, stale_share=0)
    outside.block_tables.fill_(block)
    assert_equal(check(interpreter, outside), batch_of(contexts, 4, 3).drafts(interpreted(interpreter)))


def test_ids_outside_the_vocabulary_are_never_drafted(interpreter):
    contexts = [[1, 4, 2, 1], [900, 900, 900], [3, 1, 900, 3]]
    draft_token_ids, num_drafts, _ = check(interpreter, batch_of(contexts, 4, 4))
    assert num_drafts.tolist() == [0, 0, 1]
    assert draft_token_ids[2, 0] == 1
    assert draft_token_ids[1].tolist() == [900] * 4, "the filler is the context's own last token"


def test_a_token_that_the_prior_does_not_hold_has_no_successors(interpreter):
    batch = batch_of([[1, 900], [900, 1]], 4, 2, prior_top_k=3)
    # What lies after the prior in memory would pass for a row of it.
    ids, probs = torch.full((1000, 3), 2, dtype=torch.int32), torch.full((1000, 3), 0.3)
    ids[:4], probs[:4] = batch.prior_ids, batch.prior_probs
    batch = replace(batch, prior_ids=ids[:4], prior_probs=probs[:4])
    draft_token_ids, num_drafts, _ = check(interpreter, batch)
    assert num_drafts.tolist()[0] == 0 and num_drafts[1] > 0
    assert draft_token_ids[0].tolist() == [900, 900]


def test_a_position_before_the_context_matches_nothing(interpreter):
    # Slots lie one after the other in memory: the end of another context must not lengthen a match.
    batch = batch_of([[1, 2, 1]], 10, 1, weights=ROUND)
    slot = int(batch.idx_mapping[0])
    batch.all_token_ids[:, -1] = 2
    batch.all_token_ids[slot, :5] = torch.tensor([1, 2, 3, 2, 1])
    batch.total_len[slot] = 5
    # Order 1 alone, one match: 1 / (1 + theta_1).
    assert check(interpreter, batch)[2].item() == pytest.approx(1 / 3, rel=1e-6)


def test_survival_stops_a_draft(interpreter):
    contexts = random_contexts((60, 60), 3)
    _, all_drafts, survival = check(interpreter, batch_of(contexts, 3, 8, 2, 3))
    bar = float(survival[0, 2])
    _, num_drafts, _ = check(interpreter, batch_of(contexts, 3, 8, 2, 3, min_survival=bar))
    assert all_drafts.tolist() == [8, 8]
    assert num_drafts.tolist() == (survival >= bar).sum(dim=1).tolist()
    assert num_drafts[0] == 3


def test_an_empty_batch_is_nothing_to_do(interpreter):
    batch = batch_of([[1, 2, 1]], 10)
    empty = replace(batch, idx_mapping=batch.idx_mapping[:0], num_sampled=batch.num_sampled[:0])
    assert [len(output) for output in check(interpreter, empty)] == [0, 0, 0]


@pytest.fixture(scope="module")
def texts(demo_model):
    """Real prompts in the demo model's tokens."""
    tokenizer = Tokenizer.from_file(os.path.join(demo_model, "tokenizer.json"))
    return [np.array(tokenizer.encode(prompt).ids, np.int32) for prompt in real_prompts(8, max_chars=1600)]


def real_batch(contexts, min_survival):
    """A batch whose stored predictions are right about every second time, as a model's are."""
    vocab_size, top_k = 49152, 4
    sizes = 8, top_k, 8, MAX_MATCHES, min_survival
    batch = batch_of(contexts, vocab_size, *sizes, block_size=16, weights=DEFAULT_WEIGHTS)
    rng = np.random.default_rng(1)
    for slot, context in zip(batch.idx_mapping.tolist(), contexts, strict=True):
        positions = np.arange(len(context) - 1)
        slots = batch.block_tables[slot, positions // 16].long() * 16 + torch.from_numpy(positions % 16)
        right = rng.random(len(positions)) < 0.5
        predicted = np.where(right, context[1:], rng.permutation(context)[:-1])
        batch.table[slots, 1] = torch.from_numpy(predicted.astype(np.int32))
    return batch


def cpu_drafts(drafter, batch, row):
    slot = int(batch.idx_mapping[row])
    context = batch.all_token_ids[slot, : int(batch.total_len[slot])].numpy()
    view = AlignmentView(batch.table.numpy(), batch.block_tables[slot].numpy(), batch.block_size)
    return drafter.draft(str(slot), context, view, batch.num_spec_tokens)


@pytest.mark.parametrize(
    ("first", "num_steps", "min_survival"),
    [(0, 3, 0.03), pytest.param(3, 12, 0.02, marks=pytest.mark.long)],
)
def test_real_prompts_as_they_grow(interpreter, texts, first, num_steps, min_survival):
    """Against the CPU drafter, which keeps an index; the workspace is never cleared."""
    batch = real_batch(texts[first : first + 3], min_survival)
    prior = Prior(batch.prior_ids.numpy(), batch.prior_probs.numpy())
    drafter = Drafter(batch.vocab_size, batch.num_spec_tokens, min_survival, prior)
    workspace = batch.workspace()
    full_len = batch.total_len.clone()
    num_equal = total = 0
    for step in range(num_steps):
        batch.total_len.copy_(full_len - 40 + 3 * step)
        outputs = batch.drafts(interpreted(interpreter), workspace)
        assert_equal(outputs, batch.drafts(draft_reference.draft_batch))
        for row, count in enumerate(outputs[1].tolist()):
            ours = outputs[0][row, :count].tolist(), outputs[2][row, :count].tolist()
            theirs = tuple(values.tolist() for values in cpu_drafts(drafter, batch, row))
            num_equal += assert_same_drafts(ours, theirs, min_survival)
            total += count
    assert num_equal >= 0.9 * 3 * num_steps, "near ties are rare in real prompts"
    assert total >= 2 * num_steps, "these prompts hold something to draft"


@pytest.mark.parametrize(
    ("text", "ending"),
    [(topics["specialnames"], "the"), (inspect.getsource(textwrap), " " * MAX_NGRAM_SIZE)],
    ids=["prose", "code"],
)
def test_letters_of_a_text_longer_than_a_tile(interpreter, text, ending):
    """Bytes as tokens, up to an ending that has more matches of small n-grams, or of all, than are used."""
    text = text[: text.rindex(ending, 0, 6 * TILE) + len(ending)]
    assert text.count(ending) > MAX_MATCHES + 1
    context = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    batch = batch_of([context], 256, 2, max_matches=MAX_MATCHES, weights=DEFAULT_WEIGHTS)
    draft_token_ids, num_drafts, survival = check(interpreter, batch)
    drafter = Drafter(256, 2, 0.0)
    ids, alive = drafter.draft("a", context, NO_ALIGNMENT, 2)
    count = int(num_drafts[0])
    assert count == 2
    assert_same_drafts((draft_token_ids[0].tolist(), survival[0].tolist()), (ids.tolist(), alive.tolist()), 0.0)


@pytest.mark.parametrize("is_near", [True, False])
def test_what_is_looked_through_is_bounded(interpreter, is_near):
    """A match at the window's edge, and one before it."""
    context = np.arange(100, 100 + WINDOW + 50, dtype=np.int32)
    place = 49 - (not is_near)
    context[place : place + 2] = context[-1], 5
    draft_token_ids, num_drafts, _ = check(interpreter, batch_of([context], 10, 1))
    assert num_drafts.tolist() == [int(is_near)]
    assert draft_token_ids[0, 0] == (5 if is_near else context[-1])


@pytest.fixture
def undivided(monkeypatch):
    """The reference, which looks through a context as one part."""

    def op(batch):
        with monkeypatch.context() as patch:
            patch.setattr(draft_batch_op, "PART", WINDOW)
            draft_reference.draft_batch(batch)

    return op


@pytest.mark.parametrize(
    "from_end",
    [100, PART + 2, PART + 8, PART + 500, 2 * PART + 6, 3 * PART + 300],
    ids=["last part", "in two parts", "led into the last", "older part", "in two older parts", "first part"],
)
def test_a_match_in_any_part_is_followed(interpreter, undivided, from_end):
    context = np.arange(100, 100 + 3 * PART + 777, dtype=np.int32)
    passage = np.arange(1, 13)
    context[-from_end:][:12], context[-5:] = passage, passage[:5]
    batch = batch_of([context, context[-40:]], len(context) + 200, 6, top_k=2, stale_share=0, block_size=64)
    batch.limit(6, 0)
    got = check(interpreter, batch)
    assert got[0][0].tolist() == passage[5:11].tolist() and got[1].tolist() == [6, 0]
    assert_equal(got, batch.drafts(undivided))


def test_full_lists_of_several_parts(interpreter, undivided):
    """The first draft token has every match, later ones those of the last part and what it led to in others."""
    contexts = [*random_contexts((2 * PART + 100,), 9000, seed=1), *random_contexts((PART + 1, 90), 4)]
    batch = batch_of(contexts, 9000, 3, max_matches=5)
    workspace = batch.workspace()
    got = check(interpreter, batch, workspace)
    # A call leaves what the next one needs.
    assert_equal(check(interpreter, batch, workspace), got)
    want = batch.drafts(undivided)
    assert torch.equal(got[0][:, 0], want[0][:, 0]) and torch.equal(got[2][:, 0], want[2][:, 0])
    assert not torch.equal(got[2], want[2])


@pytest.mark.parametrize("top_k", [0, 2])
def test_contexts_that_lie_beyond_what_an_int32_can_say(interpreter, tmp_path, top_k):
    batch = batch_of(random_contexts((40, 60), 3), 3, 3, top_k, 3)
    assert len(batch.total_len) == 5

    def far(of):
        found = interpreter.call("aasd_testing.large_offsets:draft_far", of, 2**30 + 16, str(tmp_path))
        for ours, theirs in zip((of.draft_token_ids, of.num_drafts, of.survival), found, strict=True):
            ours.copy_(theirs)

    assert_equal(batch.drafts(far), batch.drafts(draft_reference.draft_batch))


def test_full_lists_end_the_scan(interpreter):
    """A context of one token: all lists are full after the last tile."""
    context = np.full(3 * TILE, 7, np.int32)
    with_garbage = context.copy()
    with_garbage[: TILE // 2] = 3
    outputs = [check(interpreter, batch_of([tokens], 10, 2)) for tokens in (context, with_garbage)]
    assert_equal(*outputs)


def test_cpu_tensors_get_the_reference():
    batch = batch_of(random_contexts((50,), 3), 3)
    assert_equal(batch.drafts(draft_batch), batch.drafts(draft_reference.draft_batch))
    assert draft_batch_op._implementation("cpu") is draft_reference


def test_gpu_tensors_get_the_triton_path(interpreter):
    assert draft_batch_op._implementation("cuda") is draft_triton
    assert interpreter.call("aasd_testing.interpreter:backend_name", "draft.batch") == "vllm_aasd.kernels.draft.triton"


def test_the_op_loads_triton_only_where_it_runs():
    code = "import sys, vllm_aasd.kernels.draft.batch; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("all_token_ids", torch.zeros(4, 16), "all_token_ids has dtype torch.float32"),
        ("all_token_ids", torch.zeros((16, 4), dtype=torch.int32).T, "all_token_ids has stride 4"),
        ("total_len", torch.zeros(3, dtype=torch.int32), r"total_len has shape \(3,\), expected \(4,\)"),
        ("idx_mapping", torch.zeros(1), "idx_mapping has dtype"),
        ("table", torch.zeros((8, 4), dtype=torch.int32), r"table has shape \(8, 4\)"),
        ("table", torch.zeros((9, 5), dtype=torch.int32), "table has 9 rows, expected whole blocks of 4"),
        ("block_tables", torch.zeros((2, 8), dtype=torch.int32), r"block_tables has shape \(2, 8\)"),
        ("block_tables", torch.zeros((4, 3), dtype=torch.int32), "block_tables has 3 columns of 4 positions"),
        ("block_size", 0, "block_size is 0, must be at least 1"),
        ("theta", torch.zeros(0), "theta has no entries"),
        ("alignment", torch.zeros(2), r"alignment has shape \(2,\), expected \(6,\)"),
        ("prior_probs", torch.zeros(3, 3), "prior_probs has shape"),
        ("vocab_size", 0, "vocab_size is 0, must be at least 1"),
        ("max_matches", 0, "max_matches is 0, must be at least 1"),
        ("texts", no_texts(4, 1), r"texts is for \(slots, draft tokens\) \(4, 1\), expected \(4, 2\)"),
        ("texts", no_texts(3, 8), r"texts is for \(slots, draft tokens\) \(3, 8\), expected \(4, 2\)"),
        ("max_len", torch.zeros(4, dtype=torch.int64), "max_len has dtype torch.int64"),
        ("num_sampled", torch.zeros(2, dtype=torch.int32), r"num_sampled has shape \(2,\), expected \(1,\)"),
        ("excluded", torch.zeros(2, dtype=torch.int32), r"excluded has shape \(2,\), expected \(32,\)"),
    ],
)
def test_a_wrong_argument_is_named(field, value, message):
    batch = batch_of([[1, 2, 1]], 10, 2, 2, 3)
    workspace = batch.workspace()
    with pytest.raises(ValueError, match=message):
        replace(batch, **{field: value}).drafts(draft_batch, workspace)


def test_a_workspace_of_another_size_is_refused():
    batch = batch_of([[1, 2, 1]], 10, 2, 2, 3)
    with pytest.raises(ValueError, match=r"workspace has shape \(1, 5\), expected \(at least 1, "):
        batch.drafts(draft_batch, torch.zeros((1, 5), dtype=torch.int32))
    with pytest.raises(ValueError, match=r"workspace has shape \(0, "):
        batch.drafts(draft_batch, batch.workspace()[:0])
