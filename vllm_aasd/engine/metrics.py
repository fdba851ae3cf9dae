"""From the counters of a worker to the server's ``/metrics``, to a line in its log, and to who asks.

The counters live in the worker, ``/metrics`` in the API server; between them are processes whose messages have no room
for ours. What was weighed:

- *vLLM's stat loggers* (``vllm.stat_logger_plugins``): they see the scheduler's statistics only, a typed struct that
  drops what it doesn't know; and a plugin's mere presence turns statistics on for every server, with any method.
- *Asking by ``collective_rpc`` now and then*: engine and worker answer between two steps, so with asynchronous scheduling
  the device runs dry each time.
- *A field of another feature's statistics* (``kv_connector_stats``): breaks whoever uses that feature.
- **Files in shared memory, in the format of prometheus_client's multi-process mode**, which is what this does. A thread of
  the worker writes its figures once a second, into a folder from which they are read when ``/metrics`` is asked. No
  process waits for another, no step for anything. With several API servers vLLM itself runs in that mode and reads
  one folder, ``PROMETHEUS_MULTIPROC_DIR``: ours are put there, and any of the servers shows them. With one, the folder is
  temporary, made where ``method: aasd`` is configured, and a collector there reads it. Without that method nothing is
  made, registered or shown.

Labels are vLLM's, ``model_name`` and ``engine`` (the data-parallel rank). Of tensor-parallel ranks, which all count the same,
the first writes. A figure is at most a second old. An engine on another machine than the API server writes where
nobody reads; ``vllm_aasd.metrics.get`` asks by RPC, whatever lies between.
"""

import contextlib
import functools
import glob
import itertools
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_aasd.counters import METRICS, PREFIX, Counters, Distribution, Figure, summary
from vllm_aasd.engine.failsafe import Faults

logger = logging.getLogger("vllm.aasd")

WRITE_SECONDS = 1.0

_SHARED = "PROMETHEUS_MULTIPROC_DIR"
# "<pid of the process that owns it>:<folder>", for API servers that vLLM starts as children of that process.
_OURS = "AASD_METRICS_FOLDER"
_BY_NAME = {metric.name: metric for metric in METRICS}
_numbers = itertools.count()


@functools.cache
def serving_folder() -> str:
    """The folder into which the workers of this process's engines write; from here on their figures are collected.

    Empty if there can't be one.
    """
    shared = os.environ.get(_SHARED)
    if shared:
        return shared
    owner, _, folder = os.environ.get(_OURS, "").partition(":")
    parent = multiprocessing.parent_process()
    # Not what a process inherits that somebody else has started: that is another server.
    if parent is None or owner != str(parent.pid) or not os.path.isdir(folder):
        try:
            folder = _temporary_folder()
        except OSError as error:
            logger.warning("aasd: no figures on /metrics, for want of a folder to keep them in: %s", error)
            return ""
        os.environ[_OURS] = f"{os.getpid()}:{folder}"
    REGISTRY.register(FolderCollector(folder))
    return folder


def _temporary_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="vllm-aasd-metrics-", ignore_cleanup_errors=True)
    # Kept until the process ends: the object removes the folder when it is collected.
    _folders.append(folder)
    return folder.name


_folders: list[tempfile.TemporaryDirectory] = []


class FolderCollector(Collector):
    """Hands what the workers have written to Prometheus.

    Args:
        folder: where they write.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """All series, of all workers; nothing where they can't be read."""
        try:
            return MultiProcessCollector.merge(glob.glob(os.path.join(self._folder, "*.db")))
        except Exception:
            # Other metrics are on the same page.
            _say_once("aasd: the figures could not be read")
            return []


@functools.cache
def _say_once(text: str) -> None:
    logger.exception(text)


class FigureFiles:
    """One worker's figures in a folder that prometheus_client's multi-process mode reads.

    Args:
        folder: where.
        labels: of every series.

    Raises:
        OSError: the folder isn't there or can't be written.
    """

    def __init__(self, folder: str, labels: dict[str, str]) -> None:
        self._labels = labels
        # The process alone isn't enough: it may hold several engines, and figures of vLLM's own.
        name = f"aasd-{os.getpid()}-{next(_numbers)}.db"
        self._files = {kind: MmapedDict(os.path.join(folder, f"{kind}_{name}")) for kind in ("counter", "histogram")}
        self._written: dict[tuple[str, str, str], float] = {}

    def write(self, figures: Iterable[Figure]) -> None:
        """Write what has changed since the last time; series that are new begin to exist."""
        for name, label, value in figures:
            if isinstance(value, Distribution):
                bounds = (*_BY_NAME[name].bounds, float("inf"))
                for bound, count in zip(bounds, value.counts, strict=True):
                    self._put("histogram", name, "_bucket", count, {"le": floatToGoString(bound)})
                self._put("histogram", name, "_sum", value.sum, {})
            else:
                metric_label = _BY_NAME[name].label
                self._put("counter", name, "_total", value, {metric_label: label} if metric_label else {})

    def _put(self, kind: str, name: str, suffix: str, value: float, label: dict[str, str]) -> None:
        place = (name, suffix, *label.values())
        if self._written.get(place) == value:
            return
        self._written[place] = value
        labels = {**self._labels, **label}
        metric = _BY_NAME[name]
        key = mmap_key(PREFIX + name, PREFIX + name + suffix, list(labels), list(labels.values()), metric.doc)
        self._files[kind].write_value(key, value, 0.0)

    def close(self) -> None:
        """Let go of the files; what is in them stays."""
        for file in self._files.values():
            file.close()


class Publisher:
    """Writes a worker's figures while it serves, in a thread of its own.

    Args:
        counters: what the worker counts.
        faults: of the worker; when its place ``metrics`` is off, the figures stay as they are.
        folder: see `serving_folder`.
        model_name: as vLLM labels it.
        engine: the data-parallel rank.
        log_seconds: how often a line goes into the log, while there is something to say.
    """

    def __init__(
        self, counters: Counters, faults: Faults, folder: str, model_name: str, engine: int, log_seconds: float
    ) -> None:
        self._counters = counters
        self._faults = faults
        self._log_seconds = log_seconds
        self._engine = engine
        self._stepped = False
        self._stop = threading.Event()
        self._logged = self._figures = counters.read()
        self._next_line = time.monotonic() + log_seconds
        self._files: FigureFiles | None = None
        try:
            self._files = FigureFiles(folder, {"model_name": model_name, "engine": str(engine)})
            self._files.write(self._figures)
        except OSError as error:
            logger.warning("aasd: the figures of engine %d are not on /metrics: %s", engine, error)
        self._thread = threading.Thread(target=self._run, name="aasd-metrics", daemon=True)
        self._thread.start()

    def stepped(self) -> None:
        """There may be something new."""
        self._stepped = True

    def stop(self) -> None:
        """Write a last time."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        is_last = again = False
        while not is_last:
            is_last = self._stop.wait(WRITE_SECONDS)
            # Once more after the last step: the device may have been behind.
            stepped, self._stepped = self._stepped, False
            if not self._faults.is_off("metrics"):
                with self._faults.contained("metrics"):
                    if stepped or again or is_last:
                        self._publish()
                    self._log_now_and_then()
            again = stepped
        if self._files is not None:
            self._files.close()

    def _publish(self) -> None:
        self._figures = self._counters.read()
        if self._files is not None:
            self._files.write(self._figures)

    def _log_now_and_then(self) -> None:
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + self._log_seconds
        line = summary(self._logged, self._figures)
        self._logged = self._figures
        if line is not None:
            logger.info("Engine %03d: AASD metrics: %s", self._engine, line)


@contextlib.contextmanager
def stopped(publisher: Publisher | None) -> Iterator[None]:
    """Around the end of a worker: its last figures are written, whatever becomes of the rest."""
    try:
        yield
    finally:
        if publisher is not None:
            publisher.stop()


def collect(llm: Any) -> list[Any]:
    """The figures of an `LLM`, asked of its workers; see `vllm_aasd.metrics.get`."""
    # Heavy, and not for the worker.
    from vllm.v1.metrics.reader import Counter, Histogram

    if getattr(llm.llm_engine.vllm_config.speculative_config, "aasd", None) is None:
        raise ValueError("this LLM doesn't run with method 'aasd', so there are no figures of it")
    model_name = llm.llm_engine.vllm_config.model_config.served_model_name
    collected: list[Any] = []
    for answer in llm.collective_rpc("aasd_figures"):
        if answer is None:
            continue
        engine, figures = answer
        for name, label, value in figures:
            metric = _BY_NAME[name]
            labels = {"model_name": model_name, "engine": str(engine)}
            if metric.bounds is None:
                labels.update({metric.label: label} if metric.label else {})
                collected.append(Counter(name=PREFIX + name, labels=labels, value=value))
                continue
            counts, total = value
            bounds = (*(floatToGoString(bound) for bound in metric.bounds), "+Inf")
            buckets = dict(zip(bounds, itertools.accumulate(counts), strict=True))
            collected.append(
                Histogram(name=PREFIX + name, labels=labels, count=sum(counts), sum=total, buckets=buckets)
            )
    return collected
