"""Imports point downwards only: commands, engine, settings, the algorithm's rooms, kernels."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_aasd"
# A unit may import those below it. The package itself (its version) is under all; every other module of the
# package (plugin, doctor, ...) is a command, on top. Units of one level know nothing of each other.
LEVELS = {
    "kernels": 0,
    "drafting": 1,
    "verification": 1,
    "alignment": 1,
    "counters": 1,
    "predicted_tokens": 1,
    "corpus_names": 1,
    "config": 2,
    "engine": 4,
    "tuning": 4,
}
COMMAND_LEVEL = 5
ACCELERATORS = ("torch.accelerator", "torch.cuda", "torch.mps", "torch.xpu", "triton")
# By unit, the libraries that it must not touch; "*" stands for the other units.
FORBIDDEN = {
    "engine": (),
    "drafting": ("vllm", "torch", "triton"),
    "verification": ("vllm", *ACCELERATORS),
    "*": ("vllm",),
}


def unit_of(module: str) -> str:
    """The room of the house that `module` belongs to; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else ""


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Every dotted name that `tree` imports, or reaches as an attribute of a module of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `source`, the text of `module`, imports against the rules."""
    unit = unit_of(module)
    level = LEVELS.get(unit, COMMAND_LEVEL) if unit else -1
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name in imported_names(ast.parse(source), package):
        top = name.partition(".")[0]
        if top == "kernels":
            found.append(f"{module}: {name} (the name is {PACKAGE}.kernels)")
        elif top == PACKAGE:
            target = unit_of(name)
            allowed = target == unit or LEVELS.get(target, COMMAND_LEVEL) < level if target else unit != "kernels"
            if not allowed:
                found.append(f"{module}: {name} is not below it")
        elif any(f"{name}.".startswith(f"{library}.") for library in FORBIDDEN.get(unit, FORBIDDEN["*"])):
            found.append(f"{module}: {name} has no place there")
    return found


def modules_on_disk() -> Iterator[tuple[str, Path, bool]]:
    """Name, file, and whether it is a package, for every module of the project."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name in setuptools["packages"]:
        folder = ROOT / name.replace(".", "/")
        for file in sorted(folder.glob("*.py")):
            is_package = file.stem == "__init__"
            yield (name if is_package else f"{name}.{file.stem}"), file, is_package


def test_every_import_points_downwards():
    checked = list(modules_on_disk())
    assert {unit_of(name) for name, _, _ in checked} >= {"", "kernels", "drafting", "verification", "engine"}
    assert [line for name, file, pkg in checked for line in violations(name, file.read_text(), pkg)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_aasd.kernels.verify", "from vllm_aasd import __version__"),
        ("vllm_aasd.kernels.verify", "from ..verification import strict"),
        ("vllm_aasd.drafting.drafter", "from vllm_aasd.verification.strict import Strict"),
        ("vllm_aasd.drafting.drafter", "def late():\n    from torch import nn"),
        ("vllm_aasd.verification.strict", "import torch\ntorch.cuda.synchronize()"),
        ("vllm_aasd.alignment", "from vllm_aasd.config import Settings"),
        ("vllm_aasd.config", "from vllm_aasd.engine import patching"),
        ("vllm_aasd.config", "from vllm_aasd import tuning"),
        ("vllm_aasd.engine.v1.proposer", "from ... import plugin"),
        ("vllm_aasd.doctor", "import vllm.envs"),
        ("vllm_aasd.doctor", "from kernels import verify"),
        ("vllm_aasd", "from vllm_aasd.config import Settings"),
    ],
)
def test_the_check_sees_a_violation(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_aasd.kernels.verify", "import torch, triton\nfrom vllm_aasd.kernels import verify_reference"),
        ("vllm_aasd.kernels.verify", "from . import verify_reference\ntorch.cuda.is_available()"),
        ("vllm_aasd.engine.v1.proposer", "import vllm.envs\nfrom vllm_aasd import __version__, alignment, config"),
        ("vllm_aasd.plugin", "from vllm_aasd.engine import configuration\nimport vllm_aasd_other"),
    ],
)
def test_the_check_lets_the_rest_pass(module, source):
    assert violations(module, source) == []
