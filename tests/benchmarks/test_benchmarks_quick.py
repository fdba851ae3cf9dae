"""``--quick`` on the real engine: the suite and its comparison, small, within their five minutes."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import results

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.engine
def test_the_quick_suite_ends_in_time_with_figures_and_a_plot(demo_model, tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "--quick", "--dtype", "float32", "--results", str(tmp_path)]
    environment = {**os.environ, "MODEL": demo_model, "VLLM_CPU_KVCACHE_SPACE": "1"}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # Five minutes on a quiet machine; tests run where others do.
    assert time.monotonic() - began < 900
    result = results.read(tmp_path / "end_to_end.json")
    assert result["metadata"]["conditions"]["dtype"] == "float32"
    assert list(result["methods"]) == ["none", "aasd verification=strict"]
    assert result["exactness"]["aasd verification=strict"]["is_exact"]
    assert set(result["figures"]) == {"1", "2"}
    assert "geometric mean" in done.stdout
    drawn = {"drafter_time.json", "drafter_time.svg", "end_to_end.json", "speed.svg"}
    assert {path.name for path in tmp_path.iterdir()} == drawn
