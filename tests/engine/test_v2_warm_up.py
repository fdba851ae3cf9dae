"""What is compiled at start-up is all that serving asks for, whatever the shapes of its steps."""

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_worker import Worker

from aasd_testing.fake_v2 import MAX_LEN, PROMPTS, WIDTH, FakeRunner
from benchmarks.launches import TARGETS, recorded
from vllm_aasd.engine.v2.warm_up import kinds_of_logits
from vllm_aasd.engine.worker import AASDWorker
from vllm_aasd.kernels import align
from vllm_aasd.kernels.common import rows_triton
from vllm_aasd.kernels.draft import batch as draft_batch
from vllm_aasd.kernels.text import batch as text_batch
from vllm_aasd.kernels.verify import seeded as verify_seeded

NUM_REQS = (1, 2, 15, 16, 17, 32, 33)


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


@pytest.fixture
def asked(monkeypatch):
    """The specializations that are asked for, by kernel: at each call of an op, its kernels are launched too."""
    found: dict[str, set[str]] = {}

    class Both:
        def __init__(self, references, kernels):
            self._references, self._kernels = references, kernels

        def __getattr__(self, name):
            def call(*args):
                for launch in recorded(lambda: getattr(self._kernels, name)(*args)):
                    key = launch.sizes, launch.specialization(TARGETS["sm_90"])[1:], launch.kwargs.get("num_warps")
                    found.setdefault(launch.name, set()).add(str(key))
                return getattr(self._references, name)(*args)

            return call

    for module in (align, draft_batch, text_batch, verify_seeded):
        both = Both(module._implementation("cpu"), module._implementation("cuda"))
        monkeypatch.setattr(module, "_implementation", lambda device, both=both: both)
    return found


def logits_of(runner, dtype, stride):
    """Have the target's logits be of another dtype, in rows of another length."""
    forward = type(runner.model.head).forward

    def head(pairs):
        rows = forward(runner.model.head, pairs)
        wide = torch.zeros(len(rows), stride, dtype=dtype)
        wide[:, : rows.shape[1]] = rows
        return wide[:, : rows.shape[1]]

    runner.model.head.forward = head


def test_serving_asks_for_nothing_that_was_not_compiled(asked, monkeypatch):
    # So that the larger of these batches take wide blocks.
    monkeypatch.setattr(rows_triton, "ENOUGH_PROGRAMS", 60)
    runner = FakeRunner(max_num_reqs=max(NUM_REQS), alignment=True)
    runner.speculator.warm_up()
    compiled = {name: set(keys) for name, keys in asked.items()}
    asked.clear()
    # Its logits as they come, and as vLLM's sampler processes them.
    for dtype, stride in ((torch.bfloat16, 64), (torch.float32, 32)):
        logits_of(runner, dtype, stride)
        for num_reqs, width in zip(NUM_REQS, (WIDTH, 3, 1, 0, WIDTH, 1, 3), strict=True):
            params = SamplingParams(temperature=float(num_reqs % 2), max_tokens=40)
            for slot in range(num_reqs):
                runner.add(slot, PROMPTS[slot % len(PROMPTS)], 40, params)
            runner.width = width
            for _ in range(2):
                runner.step(list(range(num_reqs)), chunk=3 if num_reqs == 17 else MAX_LEN)
    # Only predictions, which no request has here, are compiled before.
    assert set(compiled) - set(asked) == {"begin_predictions_kernel"}
    for name, keys in asked.items():
        assert keys <= compiled[name], f"{name} would be compiled again"
    by_logits = dict.fromkeys(("row_statistics_kernel", "decide_kernel", "partials_kernel"), 4)
    by_blocks = {"race_kernel": 2, "write_kernel": 2}
    assert {name: len(keys) for name, keys in compiled.items() if len(keys) > 1} == by_logits | by_blocks


def test_a_vocabulary_that_is_no_multiple_of_16_has_parts_that_begin_anywhere():
    kinds = [
        (logits.dtype, logits.stride(0), len(logits), logits.data_ptr() % 16 == 0)
        for logits in kinds_of_logits(50257, (torch.bfloat16, torch.float32), torch.device("cpu"))
    ]
    assert len(set(kinds)) == len(kinds) == 12
    for dtype in (torch.bfloat16, torch.float32):
        assert {kind[1:3] for kind in kinds if kind[0] == dtype} == {(s, n) for s in (50257, 50304) for n in (1, 47)}
        assert {kind[3] for kind in kinds if kind[:2] == (dtype, 50257)} == {True, False}
        assert {kind[3] for kind in kinds if kind[:2] == (dtype, 50304)} == {True}
    assert len(list(kinds_of_logits(151936, (torch.float32,), torch.device("cpu")))) == 2


def test_our_kernels_are_compiled_before_vllm_captures_graphs(monkeypatch):
    assert "model_runner.capture_model()" in inspect.getsource(Worker.compile_or_warm_up_model)
    calls = mock.Mock()
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda worker: calls.vllms())
    worker = AASDWorker.__new__(AASDWorker)
    worker.use_v2_model_runner = True
    worker.speculative_config = SimpleNamespace(aasd=SimpleNamespace(prior="off"), aasd_metrics_folder=None)
    worker.model_runner = SimpleNamespace(speculator=mock.MagicMock(prior=None, warm_up=calls.ours))
    worker.compile_or_warm_up_model()
    assert calls.mock_calls == [mock.call.ours(), mock.call.vllms()]
