"""A real ``vllm serve`` in a process group of its own: started, waited for, measured, and always stopped."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+)_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_FINISHED = re.compile(r'^vllm:request_success_total\{[^}]*finished_reason="(\w+)"[^}]*\} ([0-9.e+]+)$', re.MULTILINE)


class ServerError(RuntimeError):
    """The server could not be started, or ended by itself; the text holds the end of its log."""


class SpecCounters(NamedTuple):
    """vLLM's own counters of speculative decoding; all 0 for a server that doesn't speculate.

    Attributes:
        drafts: steps of requests that verified a draft.
        draft_tokens: tokens in those drafts.
        accepted_tokens: those of them that were accepted.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int

    def since(self, earlier: "SpecCounters") -> "SpecCounters":
        """What was counted after ``earlier``."""
        return SpecCounters(*(now - then for now, then in zip(self, earlier, strict=True)))


class Server:
    """A server on a free port of this machine, from `__enter__` to `__exit__`.

    Args:
        model: path or name of the target model; it is served as ``model``.
        arguments: further ones of ``vllm serve``.
        progress: is called about once a second until the server answers, with what it is doing.
        timeout: seconds to wait for that.
        environment: variables to set for it beside this process's own.
    """

    def __init__(
        self,
        model: str,
        arguments: list[str],
        progress: Callable[[str], None],
        timeout: float = 900.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [str(vllm_command()), "serve", model, "--served-model-name", "model", *arguments]
        self._progress = progress
        self._timeout = timeout
        self._environment = environment or {}

    def __enter__(self) -> Self:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # Deleted when closed, so nothing is left behind whatever happens.
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*self._command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, **self._environment, "PYTHONUNBUFFERED": "1"},
            # Its engine is a process of its own, which must end with it.
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Of its first process, which is the id of its session too."""
        return self._process.pid

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of what the server has logged."""
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-lines:])

    def spec_counters(self) -> SpecCounters:
        """Read the counters from ``/metrics``."""
        return parse_counters(self._metrics())

    def num_finished(self) -> dict[str, int]:
        """How many requests have ended, by vLLM's reason: ``stop``, ``length``, ``abort``, ``error``, ..."""
        return parse_finished(self._metrics())

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            return response.read().decode()

    def _wait(self) -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < self._timeout:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with {self._process.returncode}\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                self._progress(f"{time.monotonic() - begin:.0f} s: {self._last_words()}")
            time.sleep(1)
        raise ServerError(f"the server doesn't answer after {self._timeout:.0f} s\n{self.log_tail()}")

    def _last_words(self) -> str:
        """The text of the newest line of the log, without process, level, time and file."""
        lines = self.log_tail(1)
        return re.sub(r"^(\(.*?\) )?(\w+ [\d-]+ [\d:.]+ \[.*?\] )?", "", lines)

    def _stop(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # What is left of the group, the engine above all.
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def parse_counters(text: str) -> SpecCounters:
    """Read the counters from the text of ``/metrics``, summed over engines."""
    totals = dict.fromkeys(SpecCounters._fields, 0)
    for name, value in _COUNTER.findall(text):
        if name in totals:
            totals[name] += int(float(value))
    return SpecCounters(**totals)


def parse_finished(text: str) -> dict[str, int]:
    """Read the ended requests by reason from the text of ``/metrics``, summed over engines."""
    totals: dict[str, int] = {}
    for reason, value in _FINISHED.findall(text):
        totals[reason] = totals.get(reason, 0) + int(float(value))
    return totals


def vllm_command() -> pathlib.Path:
    """The ``vllm`` command beside this Python."""
    command = pathlib.Path(sys.executable).parent / "vllm"
    if not command.exists():
        raise ServerError(f"no {command}: vLLM isn't installed beside this Python; `make setup` does it")
    return command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
