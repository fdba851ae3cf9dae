"""A process in which a test calls functions; everything travels by value, so nothing is shared."""

import importlib
import os
import pathlib
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any


class Process:
    """Runs a module of this package, which calls `serve`; `close` ends it.

    Args:
        module: its name.
        environment: variables to set beside this process's own.
        log: an open file for what it prints; by default this process's standard error.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Any = None) -> None:
        support = str(pathlib.Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (support, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment, "PYTHONPATH": path},
        )

    def run(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """Call `name`, "module:function", there.

        Returns:
            Its result, and the positional arguments afterwards, which it may have modified.

        Raises:
            Exception: what the function raised, with the traceback of the other process as a note.
            EOFError: the process has died.
        """
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


def serve() -> None:
    """Answer calls until the other side closes."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What is printed must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
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
