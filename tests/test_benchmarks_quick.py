"""``--quick`` on the real engine: the whole comparison, small, within its five minutes."""

import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import results

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.engine
@pytest.mark.long
def test_a_quick_comparison_ends_in_time_with_figures(demo_model, tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--quick", "--model", str(demo_model), "--dtype", "float32"]
    command += ["--methods", "none", "ngram", "--aasd", '{"aasd_verification": "strict"}', "--out", str(out)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Five minutes on a quiet machine; tests run where others do.
    assert time.monotonic() - began < 900
    result = results.read(out)
    assert list(result["methods"]) == ["none", "ngram", "aasd verification=strict"]
    assert all(found["is_exact"] for found in result["exactness"].values() if found is not None)
    assert set(result["figures"]) == {"1", "4"}
    assert "geometric mean" in done.stdout
    assert list(tmp_path.iterdir()) == [out]
