"""The checks of a GPU, interpreted: that they pass, and that each fails when what it checks is wrong."""

import subprocess
import sys
import types
from unittest import mock

import pytest
import torch

from vllm_aasd.gpu_check import kernels, speed
from vllm_aasd.gpu_check.gpu import Gpu, Skipped

HERE = "aasd_testing.stand_in_gpu"
FAULTS = ["verify", "verify state", "verify counts", "align", "align, two shards", "draft", "text"]


@pytest.mark.parametrize("op", ["verify", "align", "draft", "text"])
def test_kernels_agree_in_every_way(interpreter, op):
    result, said = interpreter.call(f"{HERE}:kernels_agree", op, ways=("plain", "side", "graph"))
    assert result == "pass" and op in said, said


@pytest.mark.parametrize("wrong", FAULTS)
def test_a_wrong_kernel_is_found(interpreter, wrong):
    op = wrong.split()[0].strip(",")
    result, said = interpreter.call(f"{HERE}:kernels_agree", op, wrong)
    assert result == "fail" and said.startswith(op) and "(plain)" in said, said


def test_a_graph_that_does_not_replay_is_found(interpreter):
    assert interpreter.call(f"{HERE}:graphs_replay", 99)[0] == "pass"
    result, said = interpreter.call(f"{HERE}:graphs_replay", 2)
    assert result == "fail" and "align 5 x 111 (graph): " in said


def test_offsets(interpreter):
    result, said = interpreter.call(f"{HERE}:offsets_agree")
    assert result == "pass" and "more than 16384 elements" in said
    result, said = interpreter.call(f"{HERE}:offsets_agree", packed=True)
    assert result == "fail" and said.startswith("align")
    with pytest.raises(Skipped, match="takes 10 GiB"):
        kernels.check_offsets(types.SimpleNamespace(free_bytes=lambda: 0), kernels.QUICK, 1)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        ("check_times", {"seconds_factor": 1e9}, "at most"),
        ("check_launches", {"num_launches": 7}, "7 launches"),
        ("check_launches", {"seconds_factor": 1e9}, "1 launches"),
        ("check_memory", {"bytes_taken": 200_000}, "announced 195864"),
    ],
)
def test_what_is_measured_has_a_limit(interpreter, check, wrong, message):
    result, said = interpreter.call(f"{HERE}:measured", check)
    assert result == "pass", said
    result, said = interpreter.call(f"{HERE}:measured", check, **wrong)
    assert result == "fail" and message in said


def test_a_step_has_no_waits_and_no_late_compilation(interpreter):
    assert interpreter.call(f"{HERE}:measured", "check_no_synchronization")[0] == "pass"
    result, said = interpreter.call(f"{HERE}:compiled_late")
    assert result == "fail" and said.startswith("compiled after the warm-up: late_kernel")


@pytest.mark.parametrize("code", [0, 9])
def test_the_sanitizer(monkeypatch, tmp_path, code):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skipped, match="isn't installed"):
        kernels.check_sanitizer(None, 3, ("memcheck",))
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "asked: $*"\nexit {code}\n')
    tool.chmod(0o755)
    if code == 0:
        assert kernels.check_sanitizer(None, 3) == "no error by memcheck and racecheck"
        return
    with pytest.raises(AssertionError, match=r"memcheck exits with 9: asked: --tool memcheck .* --only small --seed 3"):
        kernels.check_sanitizer(None, 3)


def test_near_races_may_end_either_way():
    """And others may not."""
    from vllm_aasd.gpu_check.verify_inputs import batch

    arguments = batch([torch.zeros(1, 50)], [[]], temperature=[1.0], seed=[4])
    case = kernels.Case("verify", None, None, None, (arguments,))
    ours, theirs = torch.tensor([[7]]), torch.tensor([[8]])
    assert list(kernels._differences(case, {"sampled": ours}, {"sampled": theirs}))
    with mock.patch.object(kernels, "token_gumbel", lambda *given: torch.ones(50)):
        assert not list(kernels._differences(case, {"sampled": ours}, {"sampled": theirs}))
        greedy = case._replace(arguments=(arguments | {"temperature": torch.zeros(1)},))
        assert list(kernels._differences(greedy, {"sampled": ours}, {"sampled": theirs}))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_gpu_is_asked_through_torch(monkeypatch):
    """Every method runs on a torch that has only been told that there is a GPU."""
    event = mock.MagicMock()
    event.elapsed_time.return_value = 0.5
    properties = types.SimpleNamespace(name="H200", total_memory=2**37, multi_processor_count=132)
    cuda = {
        "CUDAGraph": mock.MagicMock(),
        "graph": mock.MagicMock(),
        "Stream": mock.MagicMock(),
        "stream": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "Event": lambda enable_timing: event,
        "synchronize": mock.MagicMock(),
        "empty_cache": mock.MagicMock(),
        "mem_get_info": lambda: (5, 9),
        "memory_allocated": lambda: 7,
        "get_device_properties": lambda device: properties,
        "set_sync_debug_mode": mock.MagicMock(),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr("vllm_aasd.gpu_check.gpu._FLUSH_BYTES", 64)
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "listener", None)
    gpu = Gpu()
    knobs.compilation.listener(
        src=types.SimpleNamespace(name="k"), times=types.SimpleNamespace(total=2e6), cache_hit=False
    )
    assert gpu.compiled == [("k", 2.0)]
    assert gpu.describe().startswith("H200, 128 GiB, 132 multiprocessors")
    assert gpu.free_bytes() == 5 and gpu.allocated() == 7
    assert gpu.microseconds(lambda: None) == 500 and gpu.bandwidth() == pytest.approx(64 / 500e-6)
    assert gpu.host_microseconds(lambda: None) < 1000 and gpu.launches(lambda: torch.zeros(1)) == 0
    assert gpu.aside(lambda: 3) == 3
    cuda["Stream"]().wait_stream.assert_called_once()
    with pytest.raises(AssertionError, match="called a synchronizing"), gpu.no_synchronization():
        raise RuntimeError("called a synchronizing CUDA operation")
    assert [call.args for call in cuda["set_sync_debug_mode"].call_args_list] == [("error",), ("default",)]


def test_kernels_are_checked_without_vllm_and_numba():
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['numba'] = None; import vllm_aasd.gpu_check.__main__; "
        "from vllm_aasd.gpu_check import kernels, speed; [*kernels.cases(kernels.SMALL, 1)]; "
        "import vllm_aasd.kernels.draft.triton, vllm_aasd.kernels.text.triton, vllm_aasd.kernels.verify.triton, "
        "vllm_aasd.kernels.align.triton, vllm_aasd.kernels.verify.reference"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_sizes_are_real():
    for sizes in (kernels.QUICK, kernels.FULL):
        assert {vocab for vocab, _, _ in sizes.verify} >= {32000, 128256, 151936, 262144}
        assert max(len(counts) for _, _, counts in sizes.verify) == 256
        assert max(max(counts) for _, _, counts in sizes.verify) == 17
        assert sizes.offset == 2**31
    assert speed.FULL.contexts[-1] == 131072 and [requests for requests, _ in speed.FULL.batches] == [1, 32, 256]
