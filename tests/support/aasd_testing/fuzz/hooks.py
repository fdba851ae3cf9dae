"""What the fuzzer does in a worker: injects faults, and checks what the plugin holds.

`FuzzHooks` is a worker extension of vLLM (``--worker-extension-cls aasd_testing.fuzz.hooks.FuzzHooks``), called by
``collective_rpc``, whose arguments are strings over HTTP.
"""

import collections
import gc
import os
import re
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from aasd_testing.fault_injection import FAULT_POINTS, GRAMMAR_FAULT_POINTS, inject
from aasd_testing.fuzz.prompts import CANARIES
from aasd_testing.held import reachable
from vllm_aasd.engine.grammar.drafts import GrammarDrafts

# vLLM's over HTTP; children of n > 1 have a number before them.
_REQUEST_ID = re.compile(r"(^|_)(cmpl|chatcmpl|beam)[-_]")

# These name the last step's batch, until the next.
_OF_LAST_STEP = ("_num_drafted", "_req_ids")


class FuzzHooks:
    """To stand among the base classes of a worker."""

    def fuzz(self, method: str, *args: str) -> Any:
        """Call a method of this worker's `Hooks`, which ``begin`` makes."""
        if method == "begin":
            self._fuzz = Hooks(self._adapter)
        return getattr(self._fuzz, method)(*args)


class Hooks:
    """The hooks of one worker, around the plugin's adapter, and of the scheduler in the same process."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._points = FAULT_POINTS["V1" if hasattr(adapter, "_drafter") else "V2"] | GRAMMAR_FAULT_POINTS
        settings = adapter._settings
        self._grammars = [one for one in gc.get_objects() if type(one) is GrammarDrafts and one._settings is settings]
        self._off: set[str] = set()
        self._injected: collections.Counter[str] = collections.Counter()
        self._undo: dict[str, Callable[[], None]] = {}
        self._num_leaks = 0
        # There are many faults here, so it is the case that says what is off, and not their number.
        for faults in (adapter.faults, *(one._faults for one in self._grammars)):
            faults.is_off = lambda component: component in self._off
        # On V2, drafts stay on the device.
        if hasattr(adapter, "_drafter"):
            self._propose, adapter.propose = adapter.propose, self._checked_propose

    def begin(self, mutant: str = "") -> None:
        """Break the product, if a mutant is named."""
        if mutant:
            MUTANTS[mutant]()

    def inject(self, function: str, times: str) -> None:
        """Have a function of `FAULT_POINTS` fail so many times, instead of what is left from before."""
        self._undo.pop(function, lambda: None)()
        left = int(times)

        def fails() -> bool:
            nonlocal left
            if left == 0:
                return False
            left -= 1
            # The scheduler drafts with the same functions.
            in_grammar = any(
                frame.f_code.co_filename.endswith("grammar/drafts.py") for frame, _ in traceback.walk_stack(None)
            )
            self._injected["grammar" if in_grammar else self._points[function]] += 1
            return True

        self._undo[function] = inject(function, fails)

    def turn_off(self, component: str) -> None:
        """Have a component off, as after too many faults."""
        self._off.add(component)

    def recover(self) -> None:
        """Inject no faults from here on, and turn all components on."""
        self._off.clear()
        while self._undo:
            self._undo.popitem()[1]()

    def inspect(self) -> dict[str, Any]:
        """Where request ids are held, the counts of faults, and the worker's memory; `problems` are findings."""
        held = collections.Counter(
            path
            for owner in (self._adapter, *self._grammars)
            for path, text in reachable(owner, type(owner).__name__, _OF_LAST_STEP)
            if _REQUEST_ID.search(text)
        )
        problems = [("leak", f"{self._num_leaks} drafts hold a token of another request's")] * bool(self._num_leaks)
        faults = {component: count for component, count in self._adapter.faults.counts.items() if count}
        # The worker is told with the next step that has a grammar.
        counted = collections.Counter(faults)
        counted["grammar"] += sum(one._faults.counts["grammar"] - one._num_faults_told for one in self._grammars)
        if counted != self._injected:
            problems.append(("faults", f"counted {dict(counted)}, injected {dict(self._injected)}"))
        with open("/proc/self/statm") as file:
            mib = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return {"held": dict(held), "faults": faults, "problems": problems, "mib": round(mib)}

    def _checked_propose(self, sampled: Any, num_tokens: Any, token_ids: Any, **rest: Any) -> Any:
        """Count drafts with a canary for requests whose own tokens hold none."""
        drafts = self._propose(sampled, num_tokens, token_ids, **rest)
        for row, draft in enumerate(drafts):
            if any(token in CANARIES for token in draft):
                # Where the prompt is embeddings, the row holds what it held before.
                known = self._adapter._runner.input_batch.is_token_ids[row, : num_tokens[row]]
                self._num_leaks += not np.isin(token_ids[row, : num_tokens[row]][known], CANARIES).any()
        return drafts


def _wrong_token() -> None:
    from vllm_aasd.engine.v1.rejection_sampler import V1Verifier

    original, calls = V1Verifier.rejection_sample, [0]

    def rejection_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] % 50 == 0:
            output[0, 0] = 300
        return output

    V1Verifier.rejection_sample = rejection_sample


def _leak() -> None:
    from vllm_aasd.drafting.drafter import Drafter

    original = Drafter.forget
    Drafter.forget = lambda self, request_ids: original(self, sorted(request_ids)[1:])


MUTANTS = {"wrong_token": _wrong_token, "leak": _leak}
"""Ways to break the product, to see that the fuzzer notices: once in 50 steps the verifier emits another token than the
target's; the drafter keeps the first of the requests that end in a step."""
