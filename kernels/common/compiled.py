"""How the CPU kernels are compiled: one decorator over numba, with a cache that knows all of their files."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from vllm_aasd.kernels.common.cache_folder import cache_folder


def _cache_dir() -> str:
    """Return where compiled code is kept: a folder named by the content of the CPU kernel files and what they use.

    numba recompiles a function when its own file changes, not when a function or a number that it takes from another
    file or the way it is compiled does; without this an update of those would leave the old machine code in use.
    """
    here = Path(__file__).parents[1]
    files = sorted(path for path in here.rglob("*.py") if not path.stem.endswith(("reference", "triton")))
    sources = b"".join(path.read_bytes() for path in files)
    name = f"numba-{hashlib.sha256(sources).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        return os.path.join(numba.config.CACHE_DIR, name)
    if os.access(here, os.W_OK):
        return str(here / "__pycache__" / name)
    return os.path.join(cache_folder(), name)


_CACHE_DIR = _cache_dir()


def compiled(function: Callable[..., Any] | None = None, *, reassociate: bool = False) -> Callable[..., Any]:
    """Compile a function at its first call, without the GIL, and keep the machine code on disk.

    A product and a sum may become one fused operation; NaN and infinity keep their meaning.

    Args:
        function: the function, when used as a bare decorator.
        reassociate: let sums be reordered, so that they vectorise.
    """
    if function is None:
        return lambda inner: compiled(inner, reassociate=reassociate)
    fastmath = {"reassoc", "contract"} if reassociate else {"contract"}
    configured, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE_DIR
    try:
        return numba.njit(nogil=True, cache=True, fastmath=fastmath, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = configured
