"""A process in which Triton kernels run interpreted, on CPU tensors; run as a script, this is that process.

Triton decides at import whether it interprets, so a test session that also compiles kernels needs a second
process. `Interpreter.run` calls a function there by its name and gives back what it returned together with
its arguments, which it may have modified; everything travels by value, so nothing is shared. An exception
comes back as itself, with the traceback of the other process as a note.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


class Interpreter:
    """The interpreting process; `close` ends it."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aasd_testing.interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """Call `name`, "module:function", there; return (its result, its positional arguments afterwards)."""
        pickle.dump((name, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        done, answer, note = pickle.load(self._process.stdout)
        if not done:
            answer.add_note(note)
            raise answer
        return answer

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call `name` there and return its result."""
        return self.run(name, *args, **kwargs)[0]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def backend_name(op: str) -> str:
    """The module that implements an op, by its module's name, on CPU tensors."""
    return importlib.import_module(f"vllm_aasd.kernels.{op}")._implementation("cpu").__name__


def verify_and_state(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """What `verify_seeded` gives, and the state that it leaves behind."""
    from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

    return verify_seeded(SeededBatch(**arguments)), arguments["policies"].state


def _patch_language_once() -> None:
    """Spare the interpreter a third of its time: it looks through triton.language for what it has to replace
    not only at each launch but at each call of a device function, where nothing is left to replace."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    patched: set[int] = set()

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        is_launch = not patched
        patched.add(id(fn.__globals__))
        scope = original(fn)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch


def _serve() -> None:
    """Answer calls until the other side closes."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What vLLM prints must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # numpy warns where the interpreter computes what a kernel goes on to discard.
    warnings.simplefilter("ignore")
    import torch

    _patch_language_once()
    torch.set_num_threads(1)
    # Fills uninitialised memory with NaN and the largest integer, so that an unwritten output shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    while True:
        try:
            name, args, kwargs = pickle.load(calls)
        except EOFError:
            return
        module, _, function = name.partition(":")
        try:
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            answer = (True, (result, args), "")
        except Exception as error:
            answer = (False, error, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
