"""From a worker's counters to the server's ``/metrics``, a line in its log, and `vllm_aasd.metrics.get`.

The counters live in the worker, ``/metrics`` in the API server. A thread of the worker writes them once a second to a
small JSON file, and a collector in the API server reads these files when it is scraped, so no process and no step
waits. vLLM has no way for this: its statistics drop what they don't know, and with asynchronous scheduling
``collective_rpc`` leaves the device idle.

Labels are vLLM's, ``model_name`` and ``engine`` (the data-parallel rank). Tensor-parallel ranks count the same, so only
the first writes. Engines on other machines than the API server's aren't on its page.
"""

import contextlib
import functools
import glob
import itertools
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_aasd.counters import METRICS, PREFIX, Counters, summary
from vllm_aasd.engine import patching
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.server_folder import server_folder

logger = logging.getLogger("vllm.aasd")

WRITE_SECONDS = 1.0

_numbers = itertools.count()


@functools.cache
def serving_folder() -> str:
    """The folder that this process's engines write to; from here on, ``/metrics`` shows what is in it.

    Empty if there can't be one.
    """
    folder = server_folder()
    if not folder:
        return ""
    collector = FolderCollector(folder)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        # Several API servers: each request for the page makes a registry of its own, with vLLM's collector only.
        patching.replace({patching.MULTIPROCESS_COLLECT: collector.after})
    else:
        REGISTRY.register(collector)
    return folder


class FolderCollector(Collector):
    """Hands what the workers have written to Prometheus.

    Args:
        folder: where they write.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[CounterMetricFamily]:
        """All series of all workers; unreadable files are left out, since other metrics are on the same page."""
        series: dict[tuple[Any, ...], float] = defaultdict(float)
        for path in glob.glob(os.path.join(self._folder, "*.json")):
            try:
                with open(path) as file:
                    of_engine, values = json.load(file)
            except (OSError, ValueError):
                continue
            for name, labels, value in values:
                series[name, *(of_engine | labels).items()] += value
        families = {metric.name: CounterMetricFamily(PREFIX + metric.name, metric.doc) for metric in METRICS}
        for (name, *labels), value in series.items():
            families[name].add_sample(f"{PREFIX}{name}_total", dict(labels), value)
        return families.values()

    def after(self, stock: Callable) -> Callable:
        """`collect` of another collector, with ours after its own."""
        return lambda other: itertools.chain(stock(other), self.collect())


class Publisher:
    """Writes a worker's metrics while it serves, in a thread of its own.

    Args:
        counters: what the worker counts.
        faults: of the worker; nothing is written any more when its component ``metrics`` is off.
        folder: see `serving_folder`.
        model_name: as vLLM labels it.
        engine: the data-parallel rank.
        log_seconds: how often a line goes to the log, while drafts are verified.
    """

    def __init__(
        self, counters: Counters, faults: Faults, folder: str, model_name: str, engine: int, log_seconds: float
    ) -> None:
        self._counters = counters
        self._faults = faults
        # A process may hold several engines.
        self._path = os.path.join(folder, f"{os.getpid()}-{next(_numbers)}.json")
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._engine = engine
        self._log_seconds = log_seconds
        self._next_line = time.monotonic() + log_seconds
        self._logged = self._values = counters.read()
        self._write()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aasd-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write a last time."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(WRITE_SECONDS)
            if not self._faults.is_off("metrics"):
                with self._faults.contained("metrics"):
                    self._values = self._counters.read()
                    self._write()
                    self._log()

    def _write(self) -> None:
        temporary = f"{self._path}.tmp"
        # There is no folder on another machine than the server's, nor once the server has ended.
        with contextlib.suppress(FileNotFoundError):
            with open(temporary, "w") as file:
                json.dump((self._labels, self._values), file)
            os.replace(temporary, self._path)

    def _log(self) -> None:
        if time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + self._log_seconds
        line = summary(self._logged, self._values)
        self._logged = self._values
        if line is not None:
            logger.info("Engine %03d: AASD metrics: %s", self._engine, line)


def get(llm: Any) -> list[Any]:
    """All metrics since the engine began to serve, as `LLM.get_metrics` gives vLLM's, with or without statistics.

    Args:
        llm: a `vllm.LLM`.

    Returns:
        `Counter` of ``vllm.v1.metrics.reader``, with the names (without ``_total``), labels and meanings of the
        documentation's table, and float values.

    Raises:
        ValueError: it doesn't run with method ``aasd``.
    """
    # Heavy, and not for the worker.
    from vllm.v1.metrics.reader import Counter

    config = llm.llm_engine.vllm_config
    if getattr(config.speculative_config, "aasd", None) is None:
        raise ValueError("this LLM doesn't run with method 'aasd', so it has no metrics of it")
    model_name = config.model_config.served_model_name
    return [
        Counter(name=PREFIX + name, labels={"model_name": model_name, "engine": str(engine), **labels}, value=value)
        for engine, values in filter(None, llm.collective_rpc("aasd_metrics"))
        for name, labels, value in values
    ]
