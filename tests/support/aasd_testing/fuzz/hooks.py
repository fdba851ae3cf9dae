"""What the fuzzer does in a worker: injects faults, and looks at what the plugin holds. For tests only.

`FuzzHooks` is a worker extension of vLLM (``--worker-extension-cls aasd_testing.fuzz.hooks.FuzzHooks``), called by
``collective_rpc``, whose arguments are strings over HTTP.
"""

import collections
import faulthandler
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from aasd_testing.fuzz.prompts_of_tokens import CANARIES
from aasd_testing.fuzz.seams import owner_of

# vLLM's over HTTP; children of n > 1 have a number before them.
_REQUEST_ID = re.compile(r"(^|_)(cmpl|chatcmpl|beam|generative-scoring)[-_]")

# These name the last step's batch, until the next.
_OF_LAST_STEP = ("_num_drafted", "_req_ids")

_MAX_COLUMNS = 128
"""A table with a row for each request that gets wider than this while it serves is as wide as a client's list."""


class InjectedFault(RuntimeError):
    """Raised by an injected fault, and by nothing else."""


class FuzzHooks:
    """To stand among the base classes of a worker."""

    def fuzz(self, method: str, *args: str) -> Any:
        """Call a method of this worker's `Hooks`, which ``begin`` makes."""
        if method == "begin":
            self._fuzz = Hooks(self._adapter, self.vllm_config.scheduler_config.max_num_seqs)
        return getattr(self._fuzz, method)(*args)


class Hooks:
    """The fuzzer's hold on one worker: on its adapter, which serves so many requests at once."""

    def __init__(self, adapter: Any, max_num_reqs: int) -> None:
        self._adapter, self._max_num_reqs = adapter, max_num_reqs
        self._off: set[str] = set()
        self._injected: collections.Counter[str] = collections.Counter()
        self._leaks = 0
        self._restore: dict[str, Callable[[], None]] = {}
        # Faults are many here: that a place is off after some of them is what `off` is for.
        adapter.faults.is_off = lambda place: place in self._off
        # On the V1 model runner, where no memory drafts from the text of others.
        if hasattr(adapter, "_drafter") and adapter._settings.memory == "off":
            self._propose, adapter.propose = adapter.propose, self._proposing
        self._widths = self._columns()

    def begin(self, mutant: str = "") -> None:
        """Break the product, if a mutant is named."""
        # For people: where a process that hangs is goes to its log.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if mutant:
            MUTANTS[mutant]()

    def mend_lora(self) -> None:
        """Have requests without an adapter be as they are alone beside one with.

        A token without an adapter has the index -1, which Triton's kernels skip; vLLM 0.32's on the CPU take the last
        adapter for it. vLLM's own pull request, not merged yet: https://github.com/vllm-project/vllm/pull/48421
        """
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu

        # Of a row of zeros the second half of an adapter makes zeros, so it is left as it is.
        lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = without_adapter_nothing(lora_ops.bgmv_shrink)

    def off(self, place: str) -> None:
        """Have a place off, as after too many faults."""
        self._off.add(place)

    def calm(self) -> None:
        """No faults from here on, and every place on."""
        self._off.clear()
        while self._restore:
            self._restore.popitem()[1]()

    def _proposing(self, sampled: Any, num_tokens: Any, token_ids: Any, **rest: Any) -> Any:
        """Count drafts with a canary for requests whose own tokens hold none."""
        drafts = self._propose(sampled, num_tokens, token_ids, **rest)
        for row, draft in enumerate(drafts):
            if any(token in CANARIES for token in draft):
                # Where the prompt is embeddings, the row holds what it held before.
                known = self._adapter._runner.input_batch.is_token_ids[row, : num_tokens[row]]
                self._leaks += not np.isin(token_ids[row, : num_tokens[row]][known], CANARIES).any()
        return drafts

    def inject(self, where: str, place: str, times: str) -> None:
        """Have a function of ours fail that many times; what was to fail there before doesn't any more."""
        self._restore.pop(where, lambda: None)()
        owner, name = owner_of(where)
        real, left = getattr(owner, name), int(times)

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left > 0:
                left -= 1
                self._injected[place] += 1
                raise InjectedFault(f"injected into {name}")
            return real(*args, **kwargs)

        setattr(owner, name, failing)
        self._restore[where] = lambda: setattr(owner, name, real)

    def look(self) -> dict[str, Any]:
        """What is held and counted now; `problems` are findings."""
        wide = [
            ("wide", f"{path}: {columns} columns")
            for path, columns in self._columns().items()
            if columns > max(_MAX_COLUMNS, self._widths.get(path, 0))
        ]
        leaks, self._leaks = self._leaks, 0
        faults = {place: count for place, count in self._adapter.faults.counts.items() if count}
        problems = wide + [("leak", f"{leaks} drafts hold a token of another request's")] * bool(leaks)
        if faults != self._injected:
            problems.append(("faults", f"counted {faults}, injected {dict(self._injected)}"))
        with open("/proc/self/statm") as file:
            mib = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return {"held": held(self._adapter), "faults": faults, "problems": problems, "mib": mib}

    def _columns(self) -> dict[str, int]:
        found = {}
        for path, value in _reachable(self._adapter, type(self._adapter).__name__, set()):
            array = getattr(value, "np", value)
            if isinstance(array, np.ndarray | torch.Tensor) and array.ndim == 2 and len(array) == self._max_num_reqs:
                found[path] = array.shape[1]
        return found


def held(root: Any) -> dict[str, int]:
    """How many request ids are reachable from an object through ours and plain containers, by attribute path."""
    found: collections.Counter[str] = collections.Counter()
    for path, value in _reachable(root, type(root).__name__, set()):
        if isinstance(value, str) and _REQUEST_ID.search(value):
            found[path] += 1
    return dict(found)


def _reachable(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen and not isinstance(value, str):
        return
    seen.add(id(value))
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _reachable(key, path, seen)
            yield from _reachable(inner, path, seen)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for inner in value:
            yield from _reachable(inner, path, seen)
    elif type(value).__module__.startswith("vllm_aasd"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        names = [*vars(value)] if hasattr(value, "__dict__") else []
        for name in (*names, *slots):
            if name not in _OF_LAST_STEP and hasattr(value, name):
                yield from _reachable(getattr(value, name), f"{path}.{name}", seen)


def without_adapter_nothing(stock: Any) -> Any:
    """vLLM's ``bgmv_shrink``, whose rows of index -1 are zeros."""

    def bgmv_shrink(
        inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
    ) -> None:
        stock(inputs, weights, output, indices, scaling)
        output[indices == -1] = 0

    return bgmv_shrink


def _wrong_token() -> None:
    from vllm_aasd.engine.v1.rejection_sampler import V1Verifier

    real, calls = V1Verifier.rejection_sample, [0]

    def rejection_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] % 50 == 0:
            output[0, 0] = 300
        return output

    V1Verifier.rejection_sample = rejection_sample


def _leak() -> None:
    from vllm_aasd.drafting.drafter import Drafter

    real = Drafter.forget
    Drafter.forget = lambda self, request_ids: real(self, sorted(request_ids)[1:])


MUTANTS = {"wrong_token": _wrong_token, "leak": _leak}
"""Ways to break the product, to see that the fuzzer notices: once in 50 steps the verifier emits another token than the
target's; the drafter keeps the first of the requests that end in a step."""
