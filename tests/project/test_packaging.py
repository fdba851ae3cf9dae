"""The wheel and the sdist hold the whole project, and importing it is cheap."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Package folders by their place in the tree, as package-dir in pyproject.toml maps them.
SOURCE_FOLDERS = {"vllm_aasd": "vllm_aasd", "kernels": "vllm_aasd/kernels"}
BUILD_INPUTS = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", *SOURCE_FOLDERS)
HEAVY = ("vllm", "torch", "triton", "numba", "numpy", "transformers")


def installed_files(root: Path) -> set[str]:
    """Every file in `root`'s package folders, at its place in an installation."""
    return {
        f"{place}/{file.relative_to(root / folder).as_posix()}"
        for folder, place in SOURCE_FOLDERS.items()
        for file in (root / folder).rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".nbi", ".nbc") and "__pycache__" not in file.parts
    }


def packages_on_disk(root: Path) -> set[str]:
    """Every package of `root`: each folder that holds Python files."""
    return {Path(name).parent.as_posix().replace("/", ".") for name in installed_files(root) if name.endswith(".py")}


def listed_packages(root: Path) -> set[str]:
    """The packages that `root`'s pyproject.toml lists."""
    return set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def copy_sources(target: Path) -> Path:
    """Copy what a build needs, so that no build leaves anything in the clone or finds anything there."""
    target.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def build(source: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist built from the tree, and a wheel built from that sdist alone."""
    folder = tmp_path_factory.mktemp("sdist")
    build(copy_sources(folder / "source"), folder / "dist")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def test_every_package_is_listed():
    assert listed_packages(ROOT) == packages_on_disk(ROOT)


def test_a_wheel_from_the_sdist_holds_every_file_and_no_other_and_announces_the_plugin(built):
    sdist, wheel = built
    names = names_in(wheel)
    assert {name for name in names if ".dist-info/" not in name} == installed_files(ROOT)
    assert {"vllm_aasd/py.typed", "vllm_aasd/kernels/__init__.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["vllm.general_plugins"]) == {"aasd": "vllm_aasd.plugin:register"}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "vllm_aasd/kernels/__init__.py"} <= names


def test_an_installed_wheel_imports_and_loads_nothing_heavy(built, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", target, built[1]]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = (
        "import sys; before = set(sys.modules); import vllm_aasd; "
        "print(vllm_aasd.__file__); print(*sorted(set(sys.modules) - before)); "
        "import vllm_aasd.kernels; print(vllm_aasd.kernels.__file__)"
    )
    variables = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, check=True)
    package, loaded, kernels = done.stdout.splitlines()
    assert Path(package) == target / "vllm_aasd" / "__init__.py"
    assert Path(kernels) == target / "vllm_aasd" / "kernels" / "__init__.py"
    assert {name.partition(".")[0] for name in loaded.split()}.isdisjoint(HEAVY)
