"""The served checks on a tiny model, V2 and interpreted: they pass, and fail on a wrong verifier."""

import contextlib

import pytest

from aasd_testing.process import Process
from vllm_aasd.engine import gpu_trial

pytestmark = pytest.mark.engine
HERE = "aasd_testing.served_trial"


@pytest.fixture(scope="module")
def process():
    """A process in which vLLM serves by its V2 runner, a step ahead."""
    names = ("AASD_TEST_V2", "AASD_TEST_AHEAD", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")
    environment = dict.fromkeys(names, "1") | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with contextlib.closing(Process("aasd_testing.engine_process", environment)) as running:
        yield running


@pytest.mark.parametrize("sizes", ["SIZES", pytest.param("PREEMPTED", marks=pytest.mark.long)])
def test_answers_are_those_without_speculation(process, sizes):
    result, said = process.call(f"{HERE}:served", sizes)
    assert result == "pass" and said.startswith("3 answers equal"), said


@pytest.mark.long
def test_a_wrong_verifier_is_found(process):
    result, said = process.call(f"{HERE}:served", is_wrong=True)
    assert result == "fail" and "answers differ from those without speculation" in said


@pytest.mark.long
def test_steady(process):
    """As far as there is no device: vLLM watches for waits and compilations on GPUs alone."""
    assert process.call(f"{HERE}:steady") == ("pass", "3 greedy and sampled requests")


@pytest.mark.long
def test_speed(process):
    assert process.call(f"{HERE}:speed_of", 0.0)[0] == "pass"
    result, said = process.call(f"{HERE}:speed_of", 1e9)
    assert result == "fail" and "1 requests, planted to find" in said


def test_vllms_own_kernels_are_timed_beside(process):
    result, said = process.call(f"{HERE}:stock_kernels")
    assert result == "pass" and "vLLM's rejection_sample 3 x 200: " in said and "vLLM's ngram_gpu 1 x 64: " in said


def test_the_doctor_is_asked(monkeypatch):
    monkeypatch.setattr("vllm_aasd.engine.diagnosis.diagnose", lambda: (["a", "b has changed"], False))
    with pytest.raises(AssertionError, match="a; b has changed"):
        gpu_trial.check_doctor()


def test_another_distribution_is_seen():
    """A die that shows one side a little too often; and a fair one."""
    fair = gpu_trial.Counter({(0, side): 1000 for side in range(6)})
    other = gpu_trial.Counter({(0, side): 1000 + 20 * (side % 3 - 1) for side in range(6)})
    tilted = gpu_trial.Counter({(0, side): 1300 if side == 2 else 940 for side in range(6)})
    assert gpu_trial._same_distribution(fair, other) > 0.1
    assert gpu_trial._same_distribution(fair, tilted) < 1e-4
