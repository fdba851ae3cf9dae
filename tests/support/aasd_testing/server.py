"""A real ``vllm serve`` in a process group of its own: started, waited for, measured, and always stopped."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

_START_SECONDS = 900.0


class Server:
    """A server on a free port of this machine, from `__enter__` to `__exit__`.

    Args:
        model: path or name of the target model; it is served as ``model``.
        arguments: further ones of ``vllm serve``.
        environment: variables to set for it beside this process's own.
    """

    def __init__(self, model: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._command = [
            str(pathlib.Path(sys.executable).with_name("vllm")),
            "serve",
            model,
            "--served-model-name",
            "model",
            *arguments,
        ]
        self._environment = environment

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

    def log(self, lines: int = 0) -> str:
        """What the server has logged; the last lines of it, or all."""
        # Not by the file's own position, which is the server's, too.
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def metrics(self) -> dict[tuple, float]:
        """Every sample of ``/metrics``, by its name and labels: ``(name, (label, value), ...)``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}

    def _wait(self) -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < _START_SECONDS:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}\n{self.log(100)}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return
            time.sleep(1)
        raise RuntimeError(f"the server doesn't answer after {_START_SECONDS:.0f} s\n{self.log(100)}")

    def _stop(self) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        # What is left of the group, the engine above all.
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
