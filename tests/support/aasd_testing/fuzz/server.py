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
from typing import Self


class ServerError(RuntimeError):
    """The server could not be started, or ended by itself; the text holds the end of its log."""


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
