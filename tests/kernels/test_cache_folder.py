"""Where compiled code is kept: never where another user could have put it, and nowhere rather than not to start."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_aasd.kernels.common import cache_folder

NOBODY = 65534
CALL = """
import logging, os, sys
logging.basicConfig(format="%(levelname)s %(message)s")
from vllm_aasd.kernels.common import compiled
from increment import increment
{before}
assert increment(1) == 2
print(compiled._CACHE_DIR and os.path.realpath(compiled._CACHE_DIR), sum(increment.stats.cache_hits.values()))
"""
COMPILED = """
from vllm_aasd.kernels.common.compiled import compiled
@compiled
def increment(number):
    return number + 1
"""


@pytest.fixture
def call(tmp_path):
    """Calls a compiled function in a process that starts in an empty folder, with such an environment only."""
    started_in = tmp_path / "started in"
    started_in.mkdir()
    (tmp_path / "increment.py").write_text(COMPILED)

    def run(before="", user=None, **environment):
        command = [sys.executable, "-c", CALL.format(before=before)]
        if user is not None:
            # It may read everything, so that it finds Python and us, and write what such a user may.
            reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *reading, *command]
            started_in.chmod(0o777)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        done = subprocess.run(command, cwd=started_in, env=environment, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not list(started_in.iterdir()), "it has written to where it was started"
        folder, hits = done.stdout.rsplit(maxsplit=1)
        return folder, int(hits), [line for line in done.stderr.splitlines() if line.startswith("WARNING")]

    return run


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become another user")
@pytest.mark.parametrize(
    ("user", "environment"),
    [
        (NOBODY, {}),
        (54321, {}),  # who isn't among the users, and so has no home but by HOME
        (54321, {"HOME": "/nonexistent"}),
        (NOBODY, {"HOME": "relative"}),
        (NOBODY, {"XDG_CACHE_HOME": "relative"}),
        (NOBODY, {"AASD_CACHE_ROOT": "relative"}),
        (NOBODY, {"AASD_CACHE_ROOT": "~not-a-user/cache", "NUMBA_CACHE_DIR": "relative"}),
    ],
    ids=str,
)
def test_without_a_folder_to_write_to_it_compiles_with_one_warning(call, environment, user):
    folder, _, warnings = call(user=user, **environment)
    assert folder == "None"
    (warning,) = warnings
    assert "compiled code is kept nowhere" in warning and "set AASD_CACHE_ROOT" in warning


def test_the_cache_root_governs_compiled_code(call, tmp_path):
    root = tmp_path / "root"
    folder, hits, warnings = call(AASD_CACHE_ROOT=str(root), HOME="/nonexistent")
    assert Path(folder).parent == root and hits == 0 and warnings == []
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert call(AASD_CACHE_ROOT=str(root)) == (folder, 1, [])


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three places, of which the environment names the first, the second is the package's and the third the user's."""
    first, package, user = (tmp_path / name for name in ("first", "package", "user"))
    monkeypatch.setattr(cache_folder, "_KERNELS", package)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(first))
    monkeypatch.delenv("AASD_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    name = cache_folder.code_folder()[0].name
    shutil.rmtree(first)
    return [place / name for place in (first, package / "__pycache__", user / "vllm_aasd")]


def put_link(folder):
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def put_anothers(folder):
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can give away a folder")
    os.chown(folder, NOBODY, NOBODY)


def put_open(mode):
    def put(folder):
        folder.mkdir()
        folder.chmod(mode)

    return put


@pytest.mark.parametrize(
    "put",
    [put_open(0o777), put_open(0o775), put_open(0o1777), put_link, put_anothers, Path.touch],
    ids=["all", "group", "sticky", "link", "another's", "file"],
)
@pytest.mark.parametrize("bad", [1, 2, 3])
def test_where_others_can_write_nothing_is_loaded_from(places, put, bad):
    for folder in places[:bad]:
        folder.parent.mkdir(parents=True)
        put(folder)
    chosen, reasons = cache_folder.code_folder()
    assert chosen == (places[bad] if bad < 3 else None)
    assert len(reasons) == bad and all(str(folder) in reason for folder, reason in zip(places, reasons, strict=False))


class Bomb:
    """What runs when its pickle is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_what_is_put_in_its_place_later_is_not_loaded(call, tmp_path):
    """By whoever may rename a folder that is shared."""
    root, gone_off = tmp_path / "root", tmp_path / "gone off"
    folder = Path(call(AASD_CACHE_ROOT=str(root))[0])
    shutil.copytree(folder, tmp_path / "bad")
    indices = list((tmp_path / "bad").rglob("*.nbi"))
    for index in indices:
        index.write_bytes(pickle.dumps(Bomb(gone_off)))
    before, bad = f"{folder}-before", str(tmp_path / "bad")
    swap = f"os.rename({str(folder)!r}, {before!r}); os.rename({bad!r}, {str(folder)!r})"
    assert call(swap, AASD_CACHE_ROOT=str(root))[1] == 1
    assert indices and not gone_off.exists()
    # That it would have been seen:
    call(AASD_CACHE_ROOT=str(root))
    assert gone_off.exists()


@pytest.mark.parametrize(("suffix", "content"), [("nbi", b""), ("nbi", b"noise"), ("nbc", b"\x80\x04")])
def test_a_damaged_file_costs_a_compilation_and_is_replaced(call, tmp_path, suffix, content):
    root = str(tmp_path / "root")
    folder = call(AASD_CACHE_ROOT=root)[0]
    for file in Path(folder).rglob(f"*.{suffix}"):
        file.write_bytes(content)
    _, hits, (warning,) = call(AASD_CACHE_ROOT=root)
    assert hits == 0 and "compiling again" in warning
    assert call(AASD_CACHE_ROOT=root) == (folder, 1, [])


def test_a_full_disk_costs_the_cache_alone(call, tmp_path):
    full = f"""
from numba.core.caching import IndexDataCacheFile
def no_space(*args):
    raise OSError({errno.ENOSPC}, "No space left on device")
IndexDataCacheFile.save = no_space"""
    _, _, (warning,) = call(full, AASD_CACHE_ROOT=str(tmp_path / "root"))
    assert "compiled code isn't kept: [Errno 28] No space left on device" in warning
