"""How the CPU kernels are compiled: one decorator around numba, with a cache keyed by all of their files."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import numba
from llvmlite.binding import ffi
from numba.core.caching import CompileResultCacheImpl, FunctionCache, UserProvidedCacheLocator

from vllm_aasd.kernels.common.cache_folder import code_folder, open_private

logger = logging.getLogger("vllm.aasd")

# A vLLM worker that starts later in this process looks for Triton kernels in the `__dict__` of every object of every
# module, and fails at llvmlite's library, which answers any attribute with a foreign function. This gives it a dict.
ffi.lib._fntab.setdefault("__dict__", {})


def _cache_dir() -> str | None:
    folder, reasons = code_folder()
    if folder is None:
        logger.warning(
            "aasd: compiled code is kept nowhere, so every start compiles again: set AASD_CACHE_ROOT to a folder that "
            "only this user can write to (%s)",
            "; ".join(reasons),
        )
        return None
    # By its descriptor if possible, so that others who may rename a parent folder can't replace it from now on.
    pinned = f"/proc/self/fd/{open_private(folder)}"
    return pinned if os.path.isdir(pinned) else str(folder)


_CACHE_DIR = _cache_dir()


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (UserProvidedCacheLocator,)


class _Cache(FunctionCache):
    """numba's cache, but a file that can't be read or written means compiling again instead of failing."""

    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_once(f"{error!r} where compiled code is kept: compiling again")
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(f"compiled code isn't kept: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("aasd: %s", message)


def compiled(function: Callable[..., Any] | None = None, *, reassociate: bool = False) -> Callable[..., Any]:
    """Compile a function at its first call, without the GIL, and keep the machine code on disk.

    A product and a sum may become one fused operation; NaN and infinity keep their meaning.

    Args:
        function: the function, when used as a bare decorator.
        reassociate: let sums be reordered, so that they vectorize.
    """
    if function is None:
        return lambda inner: compiled(inner, reassociate=reassociate)
    fastmath = {"reassoc", "contract"} if reassociate else {"contract"}
    dispatcher = numba.njit(nogil=True, fastmath=fastmath, error_model="numpy")(function)
    if _CACHE_DIR is not None:
        configured, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE_DIR
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError as error:  # numba's, where the disk has become full since
            _warn_once(f"compiled code isn't kept: {error}")
        finally:
            numba.config.CACHE_DIR = configured
    return dispatcher
