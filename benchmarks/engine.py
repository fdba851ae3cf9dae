"""Real vLLM engines in processes of their own: requests go in as token ids, tokens, steps and times come out.

The other end of the pipe is `benchmarks.engine_process`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Self

from benchmarks.results import ROOT


class EngineError(RuntimeError):
    """The engine's process ended before it had answered; the text holds the end of its log."""


class Engine:
    """One engine in a process of its own, from `__enter__` to `__exit__`; between two runs it sleeps.

    Args:
        label: how it is called in messages.
        engine: arguments of ``vllm.LLM``.
        core: the only CPU core that it may run on; None for any.
        threads: of OpenMP; None for what the environment says.
        mend_sampling: whether to mend vLLM's own: see `benchmarks.engine_process.mend_sampling`.
    """

    def __init__(
        self,
        label: str,
        engine: dict[str, Any],
        core: int | None = None,
        threads: int | None = None,
        mend_sampling: bool = False,
    ) -> None:
        self._label = label
        self._scenario = {"engine": engine, "core": core, "mend_sampling": mend_sampling}
        self._environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            **os.environ,
            # The engine core runs in the child itself, so that each of its steps is seen.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)

    def __enter__(self) -> Self:
        # Deleted when closed, so nothing is left behind whatever happens.
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_process"],
            cwd=ROOT,
            env=self._environment,
            # Left open: the child ends when it is closed, however this process ends.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._send(self._scenario)
            self.ready = self._receive()["ready"]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def run(
        self,
        requests: list[dict[str, Any]],
        concurrency: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[dict[str, Any]], float]:
        """Send requests, and wait until all are answered.

        Args:
            requests: each ``{"prompt_token_ids": [...], "sampling": {...}}``, the latter for
                ``vllm.SamplingParams``; with ``"score_from": n`` the prompt's tokens from ``n`` on are
                scored.
            concurrency: so many in flight, the next one sent when one ends; None for all at once.
            progress: called after each answer with their number.

        Returns:
            The answers in the requests' order, and the seconds from the first request to the last answer.
            Per answer ``token_ids``; ``emitted``, the tokens of each step that emitted any; ``sent``,
            ``first_token`` and ``last_token`` in seconds since the run began; ``draft_tokens`` and
            ``accepted_tokens``; ``drafted`` and ``accepted``, the same by verified draft; ``logprobs``, per
            token a dict of token id to logprob, where they were asked for; ``prompt_logprobs``, the same per
            token of the prompt, None for the first; ``scores``, per scored token its logprob, and that of the
            likeliest one.

        Raises:
            EngineError: if the process ends early.
        """
        self._send(
            {
                "run": requests,
                "concurrency": concurrency or max(len(requests), 1),
                "count": progress is not None,
            }
        )
        answers: dict[int, dict[str, Any]] = {}
        while True:
            message = self._receive()
            if "seconds" in message:
                return [answers[index] for index in range(len(requests))], message["seconds"]
            if "done" in message:
                progress(message["done"])
            else:
                answers[message.pop("index")] = message

    def forget(self) -> None:
        """Drop what the engine has learnt from earlier requests: see `benchmarks.engine_process.forget`."""
        self._send({"forget": True})
        self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._error() from None

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise self._error()
        return json.loads(line)

    def _error(self) -> EngineError:
        code = self._process.wait()
        self._log.seek(0)
        return EngineError(f"{self._label}: the engine ended with {code}\n{self._log.read()[-4000:]}")

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                stream.close()
            except BrokenPipeError:
                continue


def progress_line(text: str) -> None:
    """One line that overwrites itself, on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
