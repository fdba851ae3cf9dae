"""The doctor: what it says of the installed vLLM, of one that has changed, and of where files are kept."""

import types

import pytest

from vllm_aasd import doctor
from vllm_aasd.engine import configuration, diagnosis, patching


@pytest.fixture
def run(capsys):
    """Run the command; its exit code and what it printed."""

    def run_doctor():
        with pytest.raises(SystemExit) as ended:
            doctor.main([])
        return ended.value.code, capsys.readouterr().out

    return run_doctor


@pytest.mark.parametrize(
    ("runner", "refused"), [("V1", "async_scheduling other"), ("V2", "pipeline_parallel_size other")]
)
def test_the_doctor_names_the_runner_that_will_be_chosen(run, monkeypatch, runner, refused):
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: runner == "V2")
    code, said = run()
    assert code == 0 and f"aasd will run on vLLM's {runner} model runner" in said and refused in said


def test_a_missing_function_of_the_chosen_runner_is_fatal_and_named(run, monkeypatch):
    monkeypatch.delattr("vllm.v1.worker.gpu.model_runner.init_speculator")
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: True)
    code, said = run()
    assert code == 1
    assert "vLLM has no vllm.v1.worker.gpu.model_runner.init_speculator any more" in said
    assert "aasd can't work: vLLM's V2 model runner has changed" in said
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: False)
    assert run()[0] == 0, "the V1 runner doesn't need it"


def test_the_doctor_says_where_files_are_kept_or_that_they_are_not(run, monkeypatch, tmp_path):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "relative")
    code, said = run()
    assert code == 0 and f"priors are looked for in {tmp_path}" in said
    assert f"compiled code of the CPU kernels is kept in {tmp_path / 'numba-'}" in said
    assert "not: relative is not an absolute path" in said
    monkeypatch.setenv("AASD_CACHE_ROOT", "relative")
    monkeypatch.setattr(diagnosis, "code_folder", lambda: (None, ["it is full"]))
    code, said = run()
    assert code == 0 and "no folder for priors: set AASD_CACHE_ROOT" in said
    assert "isn't kept: every start compiles it" in said and "not: it is full" in said


def test_what_can_not_work_is_fatal(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(patching, "vllm_version", lambda: "0.34.1")
        code, said = run()
        assert code == 1 and "vLLM 0.34.1 is installed" in said
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "another")
        code, said = run()
        assert code == 1 and "VLLM_PLUGINS=another" in said
    gpu = types.SimpleNamespace(
        is_cpu=lambda: False, is_cuda_alike=lambda: True, device_name="cuda", device_type="cuda"
    )
    monkeypatch.setattr(configuration, "current_platform", gpu)
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: False)
    code, said = run()
    assert code == 1 and "on GPUs it needs vLLM's V2 model runner" in said
