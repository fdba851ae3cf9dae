"""The folders of what is cached between runs: a model's prior, and compiled code."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

_KERNELS = Path(__file__).parents[1]


def cache_folder() -> Path | None:
    """``AASD_CACHE_ROOT``, by default ``vllm_aasd`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        None if that isn't an absolute path, as without a home: a relative one would depend on where the process was
        started.
    """
    folder = _cache_folder()
    return folder if folder.is_absolute() else None


def code_folder() -> tuple[Path | None, list[str]]:
    """Find or make a folder for compiled code, to which no other user but root can write.

    The first usable one: in ``NUMBA_CACHE_DIR``, in ``AASD_CACHE_ROOT``, in this package, in the user's cache. Its name
    has the user's id, so that users can share the parent folder.

    Returns:
        The folder, or None; and why those before it aren't usable.
    """
    named = [_expanded(os.environ[key]) for key in ("NUMBA_CACHE_DIR", "AASD_CACHE_ROOT") if os.environ.get(key)]
    name = f"numba-{_sources_hash()}-{os.geteuid()}"
    reasons: list[str] = []
    for place in dict.fromkeys([*named, _KERNELS / "__pycache__", _cache_folder()]):
        folder = place / name
        try:
            if not place.is_absolute():
                raise NotADirectoryError(f"{place} is not an absolute path")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(open_private(folder))
            with tempfile.TemporaryFile(dir=folder):
                return folder, reasons
        except OSError as error:
            reasons.append(str(error))
    return None, reasons


def open_private(folder: Path) -> int:
    """Open a folder; the descriptor stays valid if the folder is renamed.

    Raises:
        OSError: it doesn't exist, isn't this user's or root's, or others can write to it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    status = os.fstat(descriptor)
    if status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return descriptor
    os.close(descriptor)
    raise PermissionError(f"others can write to {folder}, and code from there would be run")


def _sources_hash() -> str:
    """Hash the CPU kernel files and what they use.

    numba recompiles a function when its own file changes, but not when a function or constant from another file or the
    options of compilation do. Without this, such an update would leave the old machine code in use.
    """
    files = sorted(path for path in _KERNELS.rglob("*.py") if not path.stem.endswith(("reference", "triton")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _cache_folder() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(os.environ.get("AASD_CACHE_ROOT") or os.path.join(user_cache, "vllm_aasd"))


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))
