"""What all tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / ".venv" / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def model_path() -> str:
    """The chat model that the tests run on: AASD_TEST_MODEL, or the one that `make model` makes."""
    path = Path(os.environ.get("AASD_TEST_MODEL") or DEMO_MODEL)
    if not (path / "config.json").is_file():
        pytest.fail(f"no model in {path}: run `make model`, or set AASD_TEST_MODEL")
    return str(path)
