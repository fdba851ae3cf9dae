"""The doctor, and the list of everything in vLLM that we rely on: what is there, and what a changed vLLM would lack."""

import types

import pytest

from vllm_aasd import doctor
from vllm_aasd.engine import configuration, diagnosis, patching, required_api
from vllm_aasd.engine.patching import PatchTarget, UnsupportedVLLMError
from vllm_aasd.engine.required_api import Abstract, Members


@pytest.fixture
def run(capsys):
    """Run the command; its exit code and what it printed."""

    def run_doctor():
        with pytest.raises(SystemExit) as ended:
            doctor.main([])
        return ended.value.code, capsys.readouterr().out

    return run_doctor


@pytest.mark.parametrize("runner", required_api.RUNNERS)
def test_the_installed_vllm_is_as_we_know_it(runner):
    assert required_api.problems(required_api.BOTH + required_api.RUNNERS[runner]) == []
    required_api.check(runner)


def test_everything_that_is_replaced_is_on_the_list():
    replaced = {value for value in vars(patching).values() if isinstance(value, PatchTarget)}
    listed = {one for one in (*required_api.BOTH, *required_api.V1, *required_api.V2) if isinstance(one, PatchTarget)}
    assert replaced and replaced <= listed


def test_the_doctor_names_the_runner_that_will_be_chosen(run, monkeypatch):
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: False)
    code, said = run()
    assert (
        code == 0
        and "aasd will run on vLLM's V1 model runner" in said
        and "async_scheduling other than None or False" in said
    )
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: True)
    code, said = run()
    assert code == 0 and "aasd will run on vLLM's V2 model runner" in said and "enable_lora other than False" in said


def test_a_missing_symbol_of_the_chosen_runner_is_fatal_and_named(run, monkeypatch):
    import vllm.v1.worker.gpu.model_runner as host

    monkeypatch.delattr(host, "init_speculator")
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: True)
    code, said = run()
    assert code == 1
    assert "vLLM has no vllm.v1.worker.gpu.model_runner.init_speculator any more" in said
    assert "aasd can't work: vLLM's V2 model runner isn't as we know it" in said
    with pytest.raises(UnsupportedVLLMError, match=r"V2 model runner\): vLLM has no .*init_speculator any more"):
        required_api.check("V2")
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
    assert "is kept nowhere: every start compiles it" in said and "not: it is full" in said


def test_an_unknown_version_is_fatal(run, monkeypatch):
    monkeypatch.setattr(patching, "vllm_version", lambda: "0.34.1")
    code, said = run()
    assert code == 1 and "vLLM 0.34.1 is installed" in said


def test_a_plugin_that_vllm_is_told_not_to_load_is_fatal(run, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    code, said = run()
    assert code == 1 and "VLLM_PLUGINS=another" in said


def test_v1_on_a_gpu_is_fatal(run, monkeypatch):
    platform = types.SimpleNamespace(
        is_cpu=lambda: False, is_cuda_alike=lambda: True, device_name="cuda", device_type="cuda"
    )
    monkeypatch.setattr(configuration, "current_platform", platform)
    monkeypatch.setattr(diagnosis, "chooses_v2", lambda: False)
    code, said = run()
    assert code == 1 and "on GPUs it needs vLLM's V2 model runner" in said


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (Members("vllm.v1.worker.gpu.states", "RequestState", ("total_len", "nothing")), "has no nothing any more"),
        (Members("vllm.v1.worker.gpu.states", "Gone", ()), "has no vllm.v1.worker.gpu.states.Gone any more"),
        (Members("vllm.v1.worker.gpu.input_batch", "InputBatch", ("idx_mapping", "gone")), "has no gone any more"),
        (
            Abstract("vllm.v1.worker.gpu.spec_decode.speculator", "BaseSpeculator", ("propose", "capture")),
            "BaseSpeculator of vLLM requires init_cudagraph_manager, unknown to us",
        ),
    ],
)
def test_a_missing_member_is_seen(members, message):
    (problem,) = required_api.problems((members,))
    assert message in problem


def test_we_define_the_methods_that_the_list_says():
    from vllm_aasd.engine.v2.requests import RequestSlots
    from vllm_aasd.engine.v2.speculator import AASDSpeculator

    ours = {"BaseSpeculator": AASDSpeculator, "LogitsProcessor": RequestSlots}
    listed = [one for one in required_api.V2 if isinstance(one, Abstract)]
    assert {one.attribute for one in listed} == set(ours)
    for one in listed:
        assert set(one.names) <= set(vars(ours[one.attribute]))
