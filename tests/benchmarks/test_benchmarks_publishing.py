"""Serving's checks, what the suite runs and leaves alone, and that the README is what results say. No engine."""

import importlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import types

import pytest

from benchmarks import (
    data,
    figures,
    methods,
    plot,
    readme,
    readme_tables,
    results,
    server,
    serving,
    serving_report,
    suite,
)

# The README


def test_a_result_that_is_missing_is_said_and_an_unknown_table_refused(tmp_path):
    block = "<!-- speed: drawn by benchmarks.plot -->\nold\n<!-- end -->"
    assert "Not published yet (`benchmarks/results/end_to_end.json`)." in readme.updated(block, tmp_path)
    with pytest.raises(ValueError, match="no table 'spead'"):
        readme.updated(block.replace("speed", "spead"), tmp_path)


def test_no_speed_of_inexact_runs_is_drawn():
    result = {"methods": {"none": None, "x": None}, "exactness": {"none": None, "x": {"is_exact": False}}}
    assert readme_tables.speed(result).startswith("No figures: x")
    assert readme_tables.tokens_per_step(result).startswith("No figures: x")
    with pytest.raises(ValueError, match="x isn't exact"):
        figures.speed(result)


def test_a_figure_without_its_result_says_what_makes_it(tmp_path, monkeypatch):
    assert plot.draw([], tmp_path) == []
    monkeypatch.setattr("sys.argv", ["plot", "ablation", "--results", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"no ablation\.json in .*; `python -m benchmarks\.suite --only ablation` makes it"
    ):
        plot.main()


def test_every_committed_figure_is_what_its_result_says(tmp_path):
    for path in results.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for drawn in plot.draw([], tmp_path):
        committed = results.RESULTS / drawn.name
        assert committed.exists(), f"run `python -m benchmarks.plot {drawn.stem}`"
        assert committed.read_bytes() == drawn.read_bytes(), f"run `python -m benchmarks.plot {drawn.stem}`"


# Serving


def report(**changes):
    fine = {
        "completed": 2, "failed": 0, "errors": ["", ""], "output_lens": [5, 9], "spec_decode_num_drafts": 3,
        "spec_decode_draft_tokens": 9, "spec_decode_accepted_tokens": 4,
    }  # fmt: skip
    return fine | changes


COUNTED = server.SpecCounters(3, 9, 4)


@pytest.mark.parametrize(
    ("changes", "ended", "complaint"),
    [
        ({"completed": 1, "failed": 1, "errors": ["", "reset"]}, {"stop": 2}, "1 of 2 requests were answered.*reset"),
        ({"output_lens": [5, 0]}, {"stop": 2}, "an answer is empty"),
        ({}, {"stop": 1}, "the server ended {'stop': 1}"),
        ({}, {"stop": 1, "abort": 1}, "abort"),
        ({"spec_decode_accepted_tokens": 5}, {"stop": 2}, "the client counted"),
    ],
)
def test_a_loss_stops_a_serving_run(changes, ended, complaint):
    serving.check(report(), 2, COUNTED, {"stop": 1, "length": 1, "abort": 0})
    with pytest.raises(server.ServerError, match=complaint):
        serving.check(report(**changes), 2, COUNTED, ended)


def test_ended_requests_are_read_by_reason():
    text = (
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0\n'
        'vllm:request_success_total{engine="1",finished_reason="stop",model_name="m"} 2.0\n'
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 1.0\n'
    )
    assert server.parse_finished(text) == {"stop": 5, "length": 1}


def arguments(**changes):
    return types.SimpleNamespace(**{"requests": 2, "rates": [1.0, 2.0], "max_prompt_tokens": 10} | changes)


TOKENIZER = types.SimpleNamespace(chat_template="t", encode=str.split)


def task(text, category):
    return types.SimpleNamespace(text=text, raw=None, category=category)


def test_no_prompt_is_asked_at_two_rates_and_categories_are_mixed():
    tasks = [task(f"{kind} {n}", kind) for kind in "ab" for n in range(3)] + [task("long " * 11, "a")]
    assert serving.prompts_by_rate(tasks, TOKENIZER, arguments()) == {1.0: ["a 0", "b 0"], 2.0: ["a 1", "b 1"]}
    with pytest.raises(data.DataError, match="6 prompts are too few for 2 rates of 4 requests"):
        serving.prompts_by_rate(tasks, TOKENIZER, arguments(requests=4))


def test_serving_ratios_are_paired_by_request():
    def run(method, scale):
        rows = [[10, 5, 1.0 * scale, 3.0 * scale], [10, 1, 2.0 * scale, 2.0 * scale]]
        return {
            "method": method, "rate": 1.0, "rows": rows, "output_throughput": 6.0, "mal": 1.0,
            "accepted_tokens": 0, "draft_tokens": 0, "texts": ["a", method],
        }  # fmt: skip

    runs = [run("none", 1.0), run("x", 0.5)]
    found = serving.figures(runs, ["none", "x"])[1]
    for key in ("ttft_ratio", "tpot_ratio", "latency_ratio"):
        assert found[key]["value"] == pytest.approx(2.0)
    assert found["ttft_ratio"]["low"] == found["ttft_ratio"]["high"] == 2.0
    assert found["tpot_ms"]["median"] == 125.0 and found["equal"] == 0.5
    result = {"figures": [found | {"method": "none"}, found], "methods": {"none": None, "x": None}}
    assert "2.00 [2.00, 2.00]" in serving_report.ratio_table(result)


def test_pandas_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(methods.MissingPackage, match="pandas"):
        methods.require_pandas()


# The suite


def test_the_budgets_are_three_hours_at_most():
    assert suite.minutes_of(suite.PROGRAMS) <= suite.BUDGET_MINUTES == 180
    lanes = [suite.Program("a", "x", (), 5, 0), suite.Program("b", "x", (), 2, 1), suite.Program("c", "x", (), 4, 1)]
    assert suite.minutes_of(lanes) == 6
    assert suite.minutes_of([*lanes, suite.Program("d", "x", (), 3)]) == 9
    assert len({program.name for program in suite.PROGRAMS}) == len(suite.PROGRAMS)


def test_commands_name_the_data_that_there_is(tmp_path):
    program = suite.Program("p", "x", ("--data", "DATA", "--builtin"), 1)
    files = [pathlib.Path("/a.jsonl"), pathlib.Path("/b.jsonl")]
    start, end = ["python", "-m", "benchmarks.x"], ["--builtin", "--out", str(tmp_path / "p.json")]
    assert suite.command_of(program, files, tmp_path, False) == [*start, "--data", "/a.jsonl", "/b.jsonl", *end]
    assert suite.command_of(program, [], tmp_path, False) == [*start, *end]
    only = suite.Program("p", "x", ("--data", "QUESTIONS"), 1)
    assert only.needs_data and not program.needs_data
    assert suite.command_of(only, files, tmp_path, False)[3:5] == ["--data", "/a.jsonl"]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("program", suite.PROGRAMS, ids=lambda program: program.name)
def test_every_program_knows_what_the_suite_tells_it(program, dtype, tmp_path, monkeypatch):
    """Each program reads its arguments, then stops for want of the result that it is to show."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    show = "--draw" if program.module == "end_to_end" else "--show"
    for quick in (False, True)[: 1 + (program.quick is not None)]:
        _, _, module, *given = suite.command_of(program, files, tmp_path, quick, dtype)
        assert (["--dtype", dtype] == given[-4:-2]) is (dtype is not None and program.takes_dtype)
        more = ["--resume"] if program.resumes else []
        monkeypatch.setattr("sys.argv", [module, *given, *more, show, str(tmp_path / "none.json")])
        with pytest.raises(FileNotFoundError, match="none.json"):
            importlib.import_module(module).main()


@pytest.mark.parametrize(
    ("given", "emulates", "dtype"),
    [([], True, "float32"), ([], False, None), (["--dtype", "bfloat16"], True, "bfloat16")],
)
def test_a_cpu_that_emulates_bfloat16_is_measured_in_float32(monkeypatch, given, emulates, dtype):
    monkeypatch.setattr("sys.argv", ["suite", *given])
    monkeypatch.setattr(suite, "emulates_bfloat16", lambda: emulates)
    assert suite._arguments().dtype == dtype


def test_a_program_with_a_dtype_gets_the_one_of_the_suite():
    for program in suite.PROGRAMS:
        source = (results.ROOT / "benchmarks" / f"{program.module}.py").read_text()
        takes = '"--dtype"' in source or "traces.add_arguments" in source or "import add_arguments" in source
        assert program.takes_dtype is (takes and program.name != "frontier"), program.name


def test_a_result_is_made_again_unless_command_and_sources_are_the_same(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    command = ["python", "-m", "benchmarks.x", "--data", "/home/me/a.jsonl", "--out", str(path)]
    recorded = ["python", "-m", "benchmarks.x", "--data", "a.jsonl", "--out", "p.json", "--resume"]
    assert not suite.is_current(path, command)

    def written(**changes):
        run = {"command": shlex.join(recorded), "uncommitted_changes": False, "commit": "same"} | changes
        path.write_text(json.dumps({"metadata": run}))
        return suite.is_current(path, command)

    monkeypatch.setattr(results, "same_sources", lambda commit: commit == "same")
    assert written()
    assert not written(command="python -m benchmarks.x --out p.json")
    assert not written(uncommitted_changes=True)
    assert not written(commit="other")


def test_sources_are_the_same_until_one_changes(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    first = git("rev-parse", "HEAD")
    (tmp_path / "README.md").write_text("x")
    git("add", ".")
    git("commit", "-qm", "no source")
    assert results.same_sources(first)
    (tmp_path / "kernels" / "a.py").write_text("2\n")
    assert not results.same_sources(first)
    assert not results.same_sources(None) and not results.same_sources("0" * 40)


def test_a_program_that_fails_is_named_and_the_others_run(monkeypatch, capsys):
    ran = []

    def run(command, **_):
        ran.append(command[1:])
        return types.SimpleNamespace(returncode=int("bad" in command))

    monkeypatch.setattr(suite.subprocess, "run", run)
    left = [
        (suite.Program("one", "x", (), 2), ["python", "bad"]),
        (suite.Program("two", "y", (), 3, resumes=True), ["python", "good"]),
    ]
    assert suite.run_all(left, at_once=False) == ["one"]
    assert ran == [["bad"], ["good", "--resume"]]
    said = capsys.readouterr().out
    assert "[1 of 2, 5 min budgeted]" in said and "one: FAILED with 1" in said


@pytest.mark.parametrize("at_once", [True, False])
def test_the_two_lanes_have_a_core_each_and_the_rest_comes_after_them(at_once, monkeypatch):
    """Where they run at once, each lane's first program waits for the other's: lanes in turn would break the barrier."""
    both, ran, pinned = threading.Barrier(2, timeout=30), [], {}

    def run(command, env, **_):
        name = command[1]
        if at_once and name.startswith("first"):
            both.wait()
        ran.append((name, env.get("VLLM_CACHE_ROOT", "")[-5:], env.get("VLLM_CPU_KVCACHE_SPACE")))
        pinned.setdefault(name, cores.get(threading.get_ident()))
        return types.SimpleNamespace(returncode=int(name == "second on 1"))

    cores = {}
    monkeypatch.setattr(suite.os, "sched_setaffinity", lambda pid, of: cores.update({threading.get_ident(): of}))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(suite.subprocess, "run", run)
    names = {"alone": None, "first on 0": 0, "first on 1": 1, "second on 1": 1}
    left = [(suite.Program(name, "x", (), 2, core), ["python", name]) for name, core in names.items()]
    assert suite.run_all(left, at_once) == ["second on 1"]
    space = "1" if at_once else None
    lanes = [("first on 0", "core0", space), ("first on 1", "core1", space), ("second on 1", "core1", space)]
    assert sorted(ran[:3]) == lanes and ran.index(lanes[1]) < ran.index(lanes[2])
    assert ran[3:] == [("alone", "", None)]
    assert pinned == {"first on 0": {0}, "first on 1": {1}, "second on 1": {1}, "alone": None}


@pytest.mark.parametrize(("dtype", "pages", "fits"), [(None, 6, True), ("float32", 6, False), (None, 4, False)])
def test_two_lanes_need_memory(dtype, pages, fits, monkeypatch):
    monkeypatch.setattr(suite.os, "sysconf", {"SC_PAGE_SIZE": 4 << 30, "SC_PHYS_PAGES": pages}.get)
    assert suite._fits_two_lanes(dtype) is fits


def test_a_core_that_is_missing_is_said_before_anything_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "--only", "kernels", "--results", str(tmp_path)]
    core = min(os.sched_getaffinity(0) - {1}, default=None)
    if core is None:
        pytest.skip("core 1 is the only one")
    done = subprocess.run(["taskset", "-c", str(core), *command], cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"core 1 isn't among those that this process may use: [{core}]" in done.stderr


def test_a_program_of_a_lane_pins_its_engines_to_the_lanes_core():
    for program in suite.PROGRAMS:
        if "--core" in program.arguments:
            assert program.arguments[program.arguments.index("--core") + 1] == str(program.core)
