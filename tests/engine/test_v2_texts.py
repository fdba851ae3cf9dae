"""Known text on the V2 model runner: who drafts from whose, against a fake of the runner's device state."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams

from aasd_testing.fake_v2 import FakeRunner, next_token, target_alone
from vllm_aasd.drafting.corpora import Corpora
from vllm_aasd.engine.namespaces import prediction_of
from vllm_aasd.engine.v2.texts import V2Texts
from vllm_aasd.kernels.text.batch import PREDICTION_COLUMN
from vllm_aasd.kernels.text.batch_reference import indexes_of
from vllm_aasd.kernels.text.reference import append, lookup

MARKER = [20, 21, 22, 23]
# What the target says after the last two.
SHARED = [9, 10, next_token(9, 10)]


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


def runner_of(**settings):
    return FakeRunner(fillers=False, min_survival=0.0, verification="strict", **settings)


def params(namespace=None, **extra):
    if namespace is not None:
        extra["vllm_aasd.namespace"] = namespace
    return SamplingParams(temperature=0.0, max_tokens=24, extra_args=extra)


def plant(runner, slot=0, namespace=1, **extra):
    """A request whose prompt ends with the marker."""
    runner.add(slot, [*SHARED, *MARKER, 30], 24, params(namespace, **extra))
    runner.step([slot])


def drafted(runner, slot=1, namespace=1, **extra):
    """What is drafted for a request whose context goes on as the prompt with the marker began."""
    runner.add(slot, SHARED[:2], 24, params(namespace, **extra))
    runner.step([slot])
    assert int(runner.tokens[slot, 2]) == SHARED[2]
    return runner.drafts[slot, : runner.counts[slot]].tolist()


def test_whoever_shares_the_namespace_drafts_from_it_and_nobody_else():
    runner = runner_of()
    plant(runner, namespace=2**63 - 1)
    assert drafted(runner, namespace=2**63 - 1) == MARKER
    for other in (0, 1, None):
        assert not set(MARKER) & set(drafted(runner, namespace=other))
    assert not set(MARKER) & set(drafted(runner, namespace=2**63 - 1, aasd_memory="off"))
    # The slot of the one that planted it, too, is another's now.
    assert not set(MARKER) & set(drafted(runner, slot=0, namespace=1))
    assert not any(runner.speculator.faults.counts.values())


def test_nothing_is_kept_of_who_wants_no_memory_or_no_speculation_or_has_no_namespace():
    for namespace, extra in ((1, {"aasd_memory": "off"}), (1, {"aasd_enabled": False}), (None, {})):
        runner = runner_of()
        plant(runner, namespace=namespace, **extra)
        texts = runner.speculator._texts._texts
        assert int(texts.begun) == 0 and (texts.tokens == -1).all()


def test_without_our_scheduler_nothing_is_shared():
    runner = runner_of()
    runner.speculator._texts._shares_text = False
    plant(runner)
    assert not set(MARKER) & set(drafted(runner))


def test_a_server_whose_memory_is_off_takes_predictions_alone():
    runner = runner_of(memory="off")
    plant(runner)
    assert not set(MARKER) & set(drafted(runner))
    assert set(MARKER) <= set(drafted(runner, aasd_prediction=[*SHARED, *MARKER]))


def test_the_bytes_that_known_text_takes_are_those_that_were_asked_for():
    assert 2**19 < runner_of().speculator.text_bytes <= 2**20 + 40_000


def test_what_is_cleared_is_gone():
    runner = runner_of()
    plant(runner)
    runner.speculator.clear_memory()
    assert not set(MARKER) & set(drafted(runner))
    plant(runner)
    assert drafted(runner) == MARKER


def test_an_answer_is_found_by_the_next_request_while_it_is_written():
    runner = runner_of()
    prompt = [9, 5, 2]
    wanted = target_alone(prompt, 20)
    for slot in (0, 1):
        runner.add(slot, prompt, 20, params(namespace=1))
    emitted = {0: runner.step([0])[0], 1: []}
    num_steps = {0: 1, 1: 0}
    while len(emitted[1]) < 20:
        for slot in [slot for slot in (0, 1) if len(emitted[slot]) < 20]:
            emitted[slot] += runner.step([slot])[slot]
            num_steps[slot] += 1
    assert emitted == {0: wanted, 1: wanted}
    assert num_steps[1] <= num_steps[0]


def test_tokens_are_the_same_with_what_others_have_said():
    runner = runner_of()
    for _ in range(3):
        for slot, prompt in enumerate(([1, 2, 4], [3, 5, 6], [9, 10])):
            runner.add(slot, prompt, 20, params(namespace=slot % 2, aasd_prediction=[*range(20)] * 3))
        emitted = {slot: [] for slot in range(3)}
        while running := [slot for slot in emitted if len(emitted[slot]) < 20]:
            for slot, tokens in runner.step(running).items():
                emitted[slot] += tokens
        assert list(emitted.values()) == [target_alone(prompt, 20) for prompt in ([1, 2, 4], [3, 5, 6], [9, 10])]
    assert not any(runner.speculator.faults.counts.values())


def test_a_prediction_is_its_own_requests():
    runner = runner_of()
    prediction = [31] * 2000 + SHARED + MARKER
    runner.add(0, [5, 6, 7], 24, params(namespace=1, aasd_prediction=prediction))
    for _ in range(2):
        runner.step([0])
    # In as many steps as it has pieces.
    assert runner.speculator._texts._predictions == {}
    assert not set(MARKER) & set(drafted(runner, slot=1, namespace=1))
    runner.add(2, SHARED[:2], 24, params(aasd_prediction=[*SHARED, *MARKER]))
    runner.step([2])
    assert runner.drafts[2].tolist() == MARKER


def test_pieces_of_many_predictions_are_the_whole_predictions():
    texts = V2Texts(2**22, True, 12, 4, torch.device("cpu"))
    device = texts.bind()
    rng = np.random.default_rng(0)
    predictions = {slot: rng.integers(30, size=int(rng.integers(1, 3000))).astype(np.int32) for slot in range(12)}
    for slot, prediction in predictions.items():
        texts.enter(slot)
        texts.admit(slot, None, prediction)
    texts.enter(3)
    num_steps = 0
    while texts._predictions:
        texts.apply_staged_writes()
        num_steps += 1
    assert 3 <= num_steps < 8
    index, _ = indexes_of(device)
    for slot, prediction in predictions.items():
        wanted = -1 if slot == 3 else len(prediction)
        assert int(device.predictions[slot, 1]) == max(wanted, 0)
        namespace = int(device.slots[slot, PREDICTION_COLUMN])
        assert (namespace == -1) == (slot == 3)
        if len(prediction) > 1100 and slot != 3:
            assert lookup(index, namespace, prediction[:1050], 1049)[:2] == (prediction[1050], 32)


def test_corpora_are_drafted_from_by_who_names_them():
    texts = V2Texts(0, True, 2, 4, torch.device("cpu"))
    without = texts.nbytes
    corpora = Corpora({"a": np.array([*MARKER, -1], np.int32)}, spare_pages=2)
    texts.learn_corpora(corpora)
    assert texts.nbytes > without
    device = texts.bind()
    assert device.num_pages == 0 and device.has_text
    texts.enter(0)
    texts.admit(0, 3, np.array([1, 2], np.int32), ["b", "a"])
    texts.enter(1)
    texts.apply_staged_writes()
    assert device.slots[:, :6].tolist() == [[1, -1, -1, -1, -1, -1], [-1] * 6]

    def found(namespace, *context):
        return lookup(indexes_of(device)[1], namespace, np.array(context, np.int32), len(context) - 1)[0]

    assert found(1, *MARKER[:2]) == MARKER[2] and found(2, *MARKER[:2]) == -1
    corpora.drop("a")
    corpora.add("b", np.array([*MARKER[::-1], -1], np.int32))
    texts.write_corpora()
    assert found(1, *MARKER[:2]) == -1 and found(2, *MARKER[:1:-1]) == MARKER[1]


@pytest.mark.parametrize("prediction", ["text", [2**40], [[1, 2], [3]], [[1, 2]], ["a"], [], {"a": 1}, 7, None])
def test_what_is_no_list_of_token_ids_predicts_nothing(prediction):
    assert prediction_of(SimpleNamespace(extra_args={"aasd_prediction": prediction})) is None


def test_appending_by_pages_or_at_once_is_the_same():
    """Of the plain function that both runners' documents follow: one that is longer than the index, too."""
    from vllm_aasd.kernels.text import PLACE_BITS, new_index
    from vllm_aasd.kernels.text.cpu import append as compiled

    tokens = np.random.default_rng(0).integers(9, size=2500).astype(np.int32)
    indexes = new_index(16), new_index(16)
    for index, op in zip(indexes, (append, compiled), strict=True):
        last_page = op(index, 3, -1, 0, tokens, 0, 40)
        assert op(index, 3, last_page, 40, tokens, 40, len(tokens)) == (39 // 16 << PLACE_BITS) + 39 % 16
    for one, other in zip(*indexes, strict=True):
        np.testing.assert_array_equal(one, other)
    assert new_index(0).begun == 0 and append(new_index(0), 3, -1, 0, tokens, 0, 9) == -1
    assert compiled(new_index(0), 3, -1, 0, tokens, 0, 9) == -1
