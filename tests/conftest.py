"""Fixtures that several test modules share."""

import os
import pathlib
import types
from collections.abc import Iterator

import pytest

from aasd_testing.interpreter import Interpreter

ROOT = pathlib.Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each file, or group of files, runs on one worker; those with engines come first, so that no worker is left alone
    with a long one at the end."""
    with_engine = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in with_engine)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Path of the small chat model that `make model` makes."""
    path = os.environ.get("AASD_TEST_MODEL", str(ROOT / ".venv/models/SmolLM2-135M-Instruct"))
    if not pathlib.Path(path, "config.json").exists():
        pytest.fail(f"no model at {path}: run `make model`, or set AASD_TEST_MODEL")
    return path


@pytest.fixture(scope="session", autouse=True)
def _no_priors_of_this_machine(tmp_path_factory):
    """Engines under test must not find what somebody has made on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AASD_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        # It would govern compiled code too, which each run need not compile anew.
        patch.setenv("NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR", str(ROOT / "kernels/__pycache__")))
        yield


@pytest.fixture
def on_v2(monkeypatch):
    """The V2 model runner as on a GPU, where scheduling is asynchronous; what it is on this machine else."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr("vllm_aasd.engine.unsupported.current_platform", types.SimpleNamespace(is_cpu=lambda: False))


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """The process in which Triton kernels run on CPU tensors."""
    process = Interpreter()
    yield process
    process.close()
