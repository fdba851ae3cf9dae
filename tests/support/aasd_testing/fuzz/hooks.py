"""What the fuzzer does in a worker: injects faults, times steps, and looks at what the plugin holds. For tests only.

`FuzzHooks` is a worker extension of vLLM (``--worker-extension-cls aasd_testing.fuzz.hooks.FuzzHooks``), called by
``collective_rpc``, whose arguments are strings over HTTP.
"""

import bisect
import collections
import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

from aasd_testing.fuzz import cpu_lora, mutants
from aasd_testing.fuzz.seams import owner_of

# vLLM's over HTTP, and the fuzzer's own in a process; children of n > 1 have a number before them.
_REQUEST_ID = re.compile(r"(^|_)(cmpl|chatcmpl|beam|fuzz)[-_]")

# These name the last step's batch, until the next.
_OF_LAST_STEP = ("_num_drafted", "_req_ids")

_BOUNDS = [0.001 * 1.1**exponent for exponent in range(120)]


class InjectedFault(RuntimeError):
    """Raised by an injected fault, and by nothing else."""


class FuzzHooks:
    """To stand among the base classes of a worker."""

    def fuzz_begin(self, mutant: str = "") -> None:
        """Begin to time steps, and take over which places are off; break the product, if a mutant is named."""
        self.fuzz = Hooks(self)
        # For people: where a process that hangs is goes to its log.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if mutant:
            mutants.apply(mutant, self)

    def fuzz_mend_lora(self) -> None:
        """Have requests without an adapter be as they are alone; see `cpu_lora`."""
        cpu_lora.mend()

    def fuzz_inject(self, where: str, place: str, times: str) -> None:
        """Have a function of ours fail the next so many times."""
        self.fuzz.inject(where, place, int(times))

    def fuzz_off(self, place: str) -> None:
        """Have a place off, as after too many faults."""
        self.fuzz.off.add(place)

    def fuzz_calm(self) -> None:
        """No faults from here on, and every place on."""
        self.fuzz.off.clear()
        self.fuzz.restore()

    def fuzz_look(self) -> dict[str, Any]:
        """What is held and counted now."""
        return self.fuzz.look()


class Hooks:
    """The fuzzer's hold on one worker.

    Attributes:
        off: places that are off.
        injected: faults raised, by place.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._adapter = worker._adapter
        self.off: set[str] = set()
        self.injected: collections.Counter[str] = collections.Counter()
        self._restore: dict[str, Callable[[], None]] = {}
        # Faults are many here: that a place is off after some of them is what `off` is for.
        self._adapter.faults.is_off = lambda place: place in self.off
        self._steps = [0] * (len(_BOUNDS) + 1)
        self._slowest = (0.0, 0)
        self._began = 0.0
        self._num_tokens = 0
        self._time(worker)

    def _time(self, worker: Any) -> None:
        execute_model, sample_tokens = worker.execute_model, worker.sample_tokens

        def executing(scheduled: Any) -> Any:
            self._began, self._num_tokens = time.perf_counter(), scheduled.total_num_scheduled_tokens
            return execute_model(scheduled)

        def sampling(grammar: Any) -> Any:
            output = sample_tokens(grammar)
            seconds = time.perf_counter() - self._began
            self._steps[bisect.bisect(_BOUNDS, seconds)] += 1
            self._slowest = max(self._slowest, (seconds, self._num_tokens))
            return output

        worker.execute_model, worker.sample_tokens = executing, sampling

    def inject(self, where: str, place: str, times: int) -> None:
        """Have a function fail; what was to fail there before doesn't any more."""
        self.restore(where)
        owner, name = owner_of(where)
        real, left = getattr(owner, name), times

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left > 0:
                left -= 1
                self.injected[place] += 1
                raise InjectedFault(f"injected into {name}")
            return real(*args, **kwargs)

        setattr(owner, name, failing)
        self._restore[where] = lambda: setattr(owner, name, real)

    def restore(self, where: str | None = None) -> None:
        """Have functions be themselves again: one, or all."""
        for name in [where] if where is not None else list(self._restore):
            self._restore.pop(name, lambda: None)()

    def look(self) -> dict[str, Any]:
        """What is held and counted now; times in seconds."""
        total = sum(self._steps)
        quantiles = {}
        for share in (0.5, 0.99):
            at, passed = 0, self._steps[0]
            while passed < share * total:
                at += 1
                passed += self._steps[at]
            quantiles[f"p{100 * share:g}"] = _BOUNDS[min(at, len(_BOUNDS) - 1)]
        return {
            "held": held(self._adapter),
            "injected": dict(self.injected),
            "faults": dict(self._adapter.faults.counts),
            "rss_mib": resident_mib(),
            "steps": {"count": total, **quantiles, "slowest": self._slowest[0], "slowest_tokens": self._slowest[1]},
        }


def held(root: Any) -> dict[str, int]:
    """How many request ids are reachable from an object through ours and plain containers, by attribute path."""
    found: collections.Counter[str] = collections.Counter()
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, str):
            found[path] += bool(_REQUEST_ID.search(value))
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(key, path)
                walk(inner, path)
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            for inner in value:
                walk(inner, path)
        elif type(value).__module__.startswith("vllm_aasd"):
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            names = [*vars(value)] if hasattr(value, "__dict__") else []
            for name in (*names, *slots):
                if name not in _OF_LAST_STEP and hasattr(value, name):
                    walk(getattr(value, name), f"{path}.{name}")

    walk(root, type(root).__name__)
    return {path: count for path, count in found.items() if count}


def resident_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
