"""tools/vllm_changes.py: what it says of two vLLMs, and that it looks at all that the engine uses."""

import subprocess
import sys
from pathlib import Path

import vllm

import vllm_changes

ROOT = Path(__file__).resolve().parents[2]
OLD = {
    "__init__": "from .config import *\nfrom vllm.worker import Worker\n",
    "config": "class Config:\n    '''Old words.'''\n    size = 1\n\n    def check(self):\n        return 1\n",
    "worker": "class Worker:\n    def step(self, n):\n        return n\n\n    def stop(self):\n        pass\n",
    "utils": "LIMIT = 3\n\n\ndef find(a):\n    return a\n",
    "envs": "A = 1\n",
}
NEW = {
    "__init__": OLD["__init__"],
    "config": "class Config:\n    '''New words.'''\n    size = 1\n    def check(self):\n        return 1  # the same\n",
    "worker": "class Worker:\n    def step(self, n):\n        return n + 1\n\n    def pause(self):\n        pass\n",
    "utils": "LIMIT = 4\n",
    "envs": "A = 2\n",
}
PLACES = {("vllm", "Config"), ("vllm", "Worker"), ("vllm.utils", "LIMIT"), ("vllm.utils", "find"), ("vllm", "envs")}


def test_what_changed_is_named(tmp_path, monkeypatch):
    for folder, files in (("old", OLD), ("new", NEW)):
        (tmp_path / folder / "vllm").mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / folder / "vllm" / f"{name}.py").write_text(text)
    monkeypatch.setattr(vllm_changes, "places", lambda: PLACES)
    assert [*vllm_changes.changes(tmp_path / "old", tmp_path / "new")] == [
        "changed  vllm.Worker: pause, step, stop",
        "changed  vllm.envs",
        "changed  vllm.utils.LIMIT",
        "gone     vllm.utils.find",
    ]
    assert [*vllm_changes.changes(tmp_path / "new", tmp_path / "old")][-1] == "new      vllm.utils.find"


def test_every_place_is_found_in_the_installed_vllm():
    folder = Path(vllm.__file__).parents[1]
    places = vllm_changes.places()
    assert {("vllm.v1.worker.gpu.model_runner", "init_speculator"), ("vllm.distributed", "get_tp_group")} <= places
    assert [place for place in places if vllm_changes.parts(folder, *place) is None] == []


def test_wrong_arguments_are_answered_with_the_usage():
    command = [sys.executable, str(ROOT / "tools/vllm_changes.py"), "/nowhere", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage: ")
