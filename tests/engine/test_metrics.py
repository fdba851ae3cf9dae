"""The way of the figures: from a worker's counters through a folder to Prometheus, to the log, and to who asks."""

import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.reader import Counter, Histogram

from vllm_aasd import metrics as public
from vllm_aasd.counters import Counters, Distribution, Figure
from vllm_aasd.engine import metrics
from vllm_aasd.engine.failsafe import MAX_FAULTS, Faults

LABELS = {"model_name": "m", "engine": "0"}


def shown(collector):
    """What Prometheus would scrape of a collector, by sample name and its own label."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in LABELS)): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def counters_with(drafted, hits=0):
    counters = Counters("cpu")
    counters.totals[1] = drafted
    counters.lookups[0] = hits
    counters.drafter_time.observe(0.0003)
    return counters


def wait_for(condition):
    """Until it holds, for ten seconds at most: other tests may have the processors."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


@pytest.fixture
def publish(tmp_path):
    """Starts publishers, and stops them all."""
    publishers = []

    def start(counters, folder=tmp_path, engine=0, log_seconds=1000.0, faults=None):
        publishers.append(metrics.Publisher(counters, faults or Faults(), str(folder), "m", engine, log_seconds))
        return publishers[-1]

    yield start
    for publisher in publishers:
        publisher.stop()


def test_every_series_is_shown_from_the_start(publish, tmp_path):
    publish(Counters("cpu"))
    samples = shown(metrics.FolderCollector(str(tmp_path)))
    assert samples["aasd:draft_tokens_total",] == 0 and samples["aasd:store_lookups_total", "stale"] == 0
    assert samples["aasd:draft_length_bucket", "+Inf"] == 0


def test_what_is_counted_later_is_written_and_read(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "WRITE_SECONDS", 0.01)
    counters = Counters("cpu")
    publisher = publish(counters)
    counters.totals[1] = 7
    counters.drafter_time.observe(0.0003)
    counters.faults = {"draft": 2}
    publisher.stepped()
    time.sleep(0.3)
    samples = shown(metrics.FolderCollector(str(tmp_path)))
    assert samples["aasd:draft_tokens_total",] == 7 and samples["aasd:faults_total", "draft"] == 2
    assert samples["aasd:drafter_time_seconds_bucket", "0.0002"] == 0
    assert samples["aasd:drafter_time_seconds_bucket", "0.0005"] == 1
    assert samples["aasd:drafter_time_seconds_count",] == 1
    assert samples["aasd:drafter_time_seconds_sum",] == 0.0003


def test_the_last_figures_are_written_at_the_end(publish, tmp_path):
    counters = Counters("cpu")
    publisher = publish(counters)
    counters.totals[1] = 9
    with pytest.raises(ZeroDivisionError), metrics.stopped(publisher):
        raise ZeroDivisionError
    assert shown(metrics.FolderCollector(str(tmp_path)))["aasd:draft_tokens_total",] == 9


def test_vllms_own_collector_of_several_servers_shows_them(publish, tmp_path):
    """As with --api-server-count: vLLM reads the folder itself. Engines are told apart by label."""
    publish(counters_with(3))
    publish(counters_with(4), engine=1)
    registry = CollectorRegistry()
    page = generate_latest(MultiProcessCollector(registry, str(tmp_path)) and registry).decode()
    assert 'aasd:draft_tokens_total{engine="0",model_name="m"} 3.0' in page
    assert 'aasd:draft_tokens_total{engine="1",model_name="m"} 4.0' in page


def test_figures_that_cannot_be_written_cost_nothing_else(publish, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "vllm.aasd"):
        publish(Counters("cpu"), folder=tmp_path / "gone", engine=3).stepped()
    assert [record.message for record in caplog.records][0].startswith(
        "aasd: the figures of engine 3 are not on /metrics"
    )


def test_a_fault_is_counted_and_costs_only_figures(publish, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "WRITE_SECONDS", 0.01)
    faults = Faults()
    counters = Counters("cpu")
    publisher = publish(counters, faults=faults)
    real, counters.read = counters.read, lambda: 1 / 0
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        publisher.stepped()
        wait_for(lambda: faults.counts["metrics"])
        counters.read, counters.totals[1] = real, 5
        publisher.stepped()
        wait_for(lambda: shown(metrics.FolderCollector(str(tmp_path)))["aasd:draft_tokens_total",] == 5)
        counters.read = lambda: 1 / 0
        wait_for(lambda: publisher.stepped() or faults.is_off("metrics"))
        publisher.stepped()
        time.sleep(0.1)
    assert faults.counts["metrics"] == MAX_FAULTS and publisher._thread.is_alive()
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]


def test_a_damaged_file_leaves_the_rest_of_the_page(tmp_path, caplog):
    metrics._say_once.cache_clear()
    (tmp_path / "counter_aasd-1-0.db").write_bytes(b"\x50\0\0\0" + b"\x7f" * 96)
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        for _ in range(3):
            assert shown(metrics.FolderCollector(str(tmp_path))) == {}
    assert len(caplog.records) == 1


def test_the_line_in_the_log_comes_while_there_is_traffic(publish, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "WRITE_SECONDS", 0.01)
    counters = Counters("cpu")
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        publisher = publish(counters, log_seconds=0.05)
        time.sleep(0.2)
        assert caplog.records == []
        counters.totals[0], counters.totals[1], counters.totals[7 + 2] = 1, 3, 1
        publisher.stepped()
        time.sleep(0.3)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "Engine 000: AASD metrics: Drafted: 3 tokens"
    ]


PARENT = """
import multiprocessing, os, subprocess, sys
from vllm_aasd.engine import metrics

def child():
    print(metrics.serving_folder(), flush=True)

if __name__ == "__main__":
    child()
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    if len(sys.argv) < 2:
        subprocess.run([sys.executable, __file__, "another server"], check=True)
"""


def test_a_server_and_its_children_share_a_folder_and_another_server_has_its_own(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {k: v for k, v in os.environ.items() if k not in ("PROMETHEUS_MULTIPROC_DIR", metrics._OURS)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, check=True, env=environment
    )
    first, its_child, second, its_childs = done.stdout.split()
    assert first == its_child != second == its_childs
    assert not os.path.exists(first) and not os.path.exists(second), "removed at the end"


def test_a_server_without_room_for_a_folder_serves_without_figures(monkeypatch, caplog):
    def full():
        raise OSError("No space left on device")

    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv(metrics._OURS, raising=False)
    monkeypatch.setattr(metrics, "_temporary_folder", full)
    metrics.serving_folder.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "vllm.aasd"):
            assert metrics.serving_folder() == ""
    finally:
        metrics.serving_folder.cache_clear()
    assert "No space left on device" in caplog.text


def test_the_folder_of_several_servers_is_vllms(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    collectors = set(REGISTRY._collector_to_names)
    metrics.serving_folder.cache_clear()
    try:
        assert metrics.serving_folder() == str(tmp_path)
    finally:
        metrics.serving_folder.cache_clear()
    assert set(REGISTRY._collector_to_names) == collectors


class FakeLLM:
    """As much of an `LLM` as the figures are asked of."""

    def __init__(self, aasd, answers=()):
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(aasd=aasd), model_config=SimpleNamespace(served_model_name="m")
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)
        self.collective_rpc = {"aasd_figures": list(answers)}.__getitem__


def test_who_asks_gets_vllms_own_kinds_of_metrics():
    figures = [
        Figure("draft_tokens", "", 5.0),
        Figure("store_lookups", "hit", 2.0),
        Figure("drafter_time_seconds", "", Distribution([1.0, 2.0] + [0.0] * 10 + [1.0], 0.5)),
    ]
    # A rank that isn't the first answers nothing.
    got = public.get(FakeLLM(object(), [(1, figures), None]))
    labels = {"model_name": "m", "engine": "1"}
    assert got[:2] == [
        Counter("aasd:draft_tokens", labels, 5.0),
        Counter("aasd:store_lookups", {**labels, "result": "hit"}, 2.0),
    ]
    assert isinstance(got[2], Histogram) and (got[2].count, got[2].sum) == (4, 0.5)
    assert list(got[2].buckets.items())[:3] == [("5e-05", 1), ("0.0001", 3), ("0.0002", 3)]
    assert got[2].buckets["+Inf"] == 4


def test_an_llm_with_another_method_is_refused():
    with pytest.raises(ValueError, match="doesn't run with method 'aasd'"):
        public.get(FakeLLM(None))


def test_figures_travel_as_they_are():
    """What collective_rpc sends between processes: msgpack knows tuples, strings and numbers."""
    import msgspec

    figures = counters_with(5).read()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode((0, figures)))
    assert sent[1][0] == ["draft_tokens", "", 5.0]
    assert all(type(value) in (float, list) for _, _, value in sent[1])
    assert torch.is_tensor(Counters("cpu").totals)


@pytest.mark.parametrize(
    "code",
    [
        # Registered, and with a config: all that a front end has of ours.
        """
import vllm.engine.arg_utils
before = {"numba", "llvmlite"} & set(sys.modules)
from vllm_aasd.plugin import register
register()
from vllm_aasd.engine.configuration import AASDSpeculativeConfig
assert {"numba", "llvmlite"} & set(sys.modules) == before
""",
        # A worker's start after an engine of ours has compiled its kernels in the same process.
        """
from vllm_aasd.kernels.verify import cpu
assert "llvmlite.binding.ffi" in sys.modules
from vllm.platforms import current_platform
current_platform.register_triton_kernel_overrides()
""",
    ],
    ids=["registered", "after an engine"],
)
def test_numba_is_not_in_the_way_of_vllms_start(code):
    """vLLM's worker looks through all modules for its kernels when it starts, and fails on one of numba's objects."""
    subprocess.run([sys.executable, "-c", "import sys\n" + code], check=True)
