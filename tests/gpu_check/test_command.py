"""`python -m vllm_aasd.gpu_check`: what it prints, reports and exits with."""

import json
import subprocess
import sys
import time

import pytest

from aasd_testing.stand_in_gpu import StandInGpu
from vllm_aasd.gpu_check import __main__ as command
from vllm_aasd.gpu_check.gpu import Skipped


def fails():
    raise AssertionError("7 of 9 differ")


def is_skipped():
    raise Skipped("takes 10 GiB")


def made(*runs):
    def of(gpu, quick, seed):
        return [command.Check(f"check {i}", "all equal", run, i != 1) for i, run in enumerate(runs)]

    return of


@pytest.fixture
def run(tmp_path, capsys):
    """The command's exit code, its lines and its report."""

    def run_checks(*runs, arguments=()):
        file = tmp_path / "report.json"
        with pytest.raises(SystemExit) as ended:
            command.main(["--report", str(file), *arguments], StandInGpu(), made(*runs))
        return ended.value.code, capsys.readouterr().out, json.loads(file.read_text())

    return run_checks


def test_all_pass(run):
    code, said, report = run(lambda: "12 inputs", lambda: "fine", is_skipped, arguments=["--seed", "5"])
    assert code == 0
    head, first, *_, last = said.splitlines()
    assert head.endswith("seed 5: a stand-in")
    assert first.startswith("pass") and first.endswith("12 inputs [all equal]") and last.startswith("skip")
    assert [one["result"] for one in report["checks"]] == ["pass", "pass", "skip"]
    assert report["seed"] == 5 and report["checks"][0]["criterion"] == "all equal"


def test_one_fails_and_the_others_run(run):
    code, said, report = run(lambda: "", fails, lambda: "")
    assert code == 1 and "7 of 9 differ" in said
    assert [one["result"] for one in report["checks"]] == ["pass", "FAIL", "pass"]


def test_what_is_cut_short_fails_and_is_reported(run, monkeypatch):
    monkeypatch.setattr(command, "SECONDS", {False: 1})
    code, said, report = run(lambda: "first", lambda: time.sleep(60), lambda: time.sleep(60))
    assert code == 1 and said.count("there was no time left") == 2
    assert [one["result"] for one in report["checks"]] == ["pass", "FAIL", "FAIL"]


def test_quick_and_only(run):
    assert len(run(fails, fails, fails, arguments=["--quick"])[2]["checks"]) == 2
    assert [one["name"] for one in run(fails, fails, arguments=["--only", "check 1"])[2]["checks"]] == ["check 1"]


def test_the_report_is_written_after_each_check(run, tmp_path):
    read = lambda: str(len(json.loads((tmp_path / "report.json").read_text())["checks"]))
    _, _, report = run(lambda: "", read, read)
    assert [one["found"] for one in report["checks"]] == ["", "1", "2"]


def test_the_checks_of_a_machine(monkeypatch):
    found = command.checks(StandInGpu(), False, 1)
    assert [one.name for one in found][:3] == ["small", "doctor", "kernels"]
    assert {one.name for one in found} >= {"served", "times", "launches", "offsets", "memory", "speed", "sanitizer"}
    assert len({one.name for one in found}) == len(found)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vllm_aasd.engine.gpu_trial", None)
        patch.delattr("vllm_aasd.engine.gpu_trial", raising=False)
        for name in ("doctor", "served", "steady", "speed"):
            with pytest.raises(Skipped, match="vLLM can't be imported"):
                next(one for one in found if one.name == name).run()
        assert command._stock_calls(None) == {}


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "vllm_aasd.gpu_check"], capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no CUDA or ROCm device" in done.stderr
    assert done.stderr.count("\n") == 1
