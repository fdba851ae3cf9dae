"""The way of the metrics: from a worker's counters through a folder to Prometheus, to the log, and to `metrics.get`."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.reader import Counter

from vllm_aasd import metrics as public
from vllm_aasd.counters import METRICS, Counters, summary
from vllm_aasd.engine import metrics, server_folder
from vllm_aasd.engine.failsafe import MAX_FAULTS, Faults
from vllm_aasd.kernels import count
from vllm_aasd.kernels.verify import VerifyOutput

LABELS = {"model_name": "m", "engine": "0"}


def shown(collector, own=LABELS):
    """What Prometheus would scrape of a collector, by sample name and its own label."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in own)): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def counted():
    """Two drafts: of two tokens, one accepted; and of three, all accepted, one of them by a relaxed policy."""
    counters = Counters("cpu")
    count.count_drafts(
        counters.totals,
        torch.tensor([5, 6, 7, 8, 9]),
        torch.tensor([0, 2, 5]),
        0,
        torch.tensor([0, 1]),
        torch.tensor([[0.9, 0.4, 0.0], [1.0, 0.95, 0.9]]),
        VerifyOutput(
            torch.empty(0),
            torch.tensor([2, 4]),
            torch.tensor([False, False, True, False, False]),
            torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0]),
            torch.tensor([False, False]),
            torch.tensor([True, False]),
        ),
    )
    counters.lookups += torch.tensor([6, 3, 1])
    return counters


def counters_with(relaxed):
    counters = Counters("cpu")
    counters.totals[count.RELAXED] = relaxed
    return counters


def wait_for(condition):
    """Until it holds, for ten seconds at most: other tests may have the processors."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Starts publishers, which write every 10 ms, and stops them all."""
    monkeypatch.setattr(metrics, "WRITE_SECONDS", 0.01)
    publishers = []

    def start(counters, folder=tmp_path, engine=0, log_seconds=1000.0, faults=None):
        publishers.append(metrics.Publisher(counters, faults or Faults(), str(folder), "m", engine, log_seconds))
        return publishers[-1]

    yield start
    for publisher in publishers:
        publisher.stop()


def test_what_was_counted_is_read_and_cleared():
    counters = counted()
    got = {(name, *labels.values()): value for name, labels, value in counters.read()}
    assert list(dict.fromkeys(name for name, *_ in got)) == [m.name for m in METRICS if m.name != "faults"]
    assert got["relaxed_tokens",] == 1 and got["regret_nats",] == 0.5
    assert got["budget_exhausted",] == 0 and got["collapse_guard_engaged",] == 1
    assert got["survival_tokens", "0.9-1.0"] == 4 and got["survival_accepted", "0.9-1.0"] == 4
    assert abs(got["survival_promised", "0.9-1.0"] - 3.75) < 1e-6
    assert got["survival_tokens", "0.4-0.5"] == 1 and got["survival_accepted", "0.4-0.5"] == 0
    assert [got["store_lookups", result] for result in ("hit", "miss", "stale")] == [6, 3, 1]
    totals = counters.totals
    counters.clear()
    assert counters.totals is totals, "the runner holds it"
    assert counters.read() == Counters("cpu").read() and not any(value for *_, value in counters.read())


def test_the_page_follows_the_counters_until_the_end(publish, tmp_path):
    faults, collector = Faults(), metrics.FolderCollector(str(tmp_path))
    counters = Counters("cpu", faults.counts)
    publisher = publish(counters)
    samples = shown(collector)
    assert samples["aasd:relaxed_tokens_total",] == 0, "every series from the start"
    assert {name for name, *_ in samples} == {f"aasd:{metric.name}_total" for metric in METRICS}
    counters.totals += counted().totals
    faults.counts["draft"] = 2
    wait_for(lambda: shown(collector)["aasd:faults_total", "draft"] == 2)
    assert shown(collector)["aasd:survival_tokens_total", "0.9-1.0"] == 4
    counters.lookups[0] = 7
    publisher.stop()
    assert shown(collector)["aasd:store_lookups_total", "hit"] == 7, "what came last is written too"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_engines_have_their_own_series_and_a_dead_ones_stay(publish, tmp_path):
    code = (
        "import os, sys; from vllm_aasd.counters import Counters; from vllm_aasd.engine import failsafe, metrics; "
        "counters = Counters('cpu'); counters.totals[0] = 4; "
        "metrics.Publisher(counters, failsafe.Faults(), sys.argv[1], 'm', 1, 9.0); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    publish(counters_with(3))
    publish(counters_with(2))
    samples = shown(metrics.FolderCollector(str(tmp_path)), own=("model_name",))
    relaxed = {engine: value for (name, engine, *_), value in samples.items() if name == "aasd:relaxed_tokens_total"}
    assert relaxed == {"0": 5, "1": 4}, "two engines of one process and with the same labels are added up"


def test_a_full_disk_leaves_the_last_values_and_costs_only_metrics(publish, tmp_path, caplog):
    faults, counters, collector = Faults(), counters_with(3), metrics.FolderCollector(str(tmp_path))
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        publisher = publish(counters, faults=faults)
        full = Path(f"{publisher._path}.tmp")
        full.symlink_to("/dev/full")
        wait_for(lambda: faults.counts["metrics"])
        full.unlink()
        counters.totals[count.RELAXED] = 5
        wait_for(lambda: shown(collector)["aasd:relaxed_tokens_total",] == 5)
        full.symlink_to("/dev/full")
        wait_for(lambda: faults.is_off("metrics"))
        time.sleep(0.1)
    assert shown(collector)["aasd:relaxed_tokens_total",] == 5
    assert faults.counts["metrics"] == MAX_FAULTS and publisher._thread.is_alive()
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]


def test_a_folder_that_is_gone_or_on_another_machine_costs_the_page_and_no_fault(publish, tmp_path, caplog):
    faults, counters, folder = Faults(), counted(), tmp_path / "folder"
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        publisher = publish(counters, folder, faults=faults, log_seconds=0.05)
        counters.totals += 1
        wait_for(lambda: "AASD metrics" in caplog.text)
        folder.mkdir()
        wait_for(lambda: list(folder.iterdir()))
        shutil.rmtree(folder)
        publisher.stop()
    assert faults.counts["metrics"] == 0 and not any(record.exc_info for record in caplog.records)


def test_a_damaged_file_leaves_the_rest_of_the_page(publish, tmp_path):
    publish(counters_with(3))
    (tmp_path / "1-0.json").write_bytes(b'[{"model_name": "m", "\xff')
    (tmp_path / "2-0.json").symlink_to(tmp_path / "gone")
    assert shown(metrics.FolderCollector(str(tmp_path)))["aasd:relaxed_tokens_total",] == 3


def test_the_line_in_the_log_comes_while_there_is_traffic(publish, caplog):
    counters = Counters("cpu")
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        publish(counters, log_seconds=0.05)
        time.sleep(0.2)
        assert caplog.records == []
        counters.totals += counted().totals
        wait_for(lambda: caplog.records)
        time.sleep(0.2)
    assert [record.message for record in caplog.records] == [
        "Engine 000: AASD metrics: Survival promised: 83.0%, kept: 80.0%, Relaxed: 1 tokens (0.50 nats)"
    ]
    assert summary(Counters("cpu").read(), counted().read()).endswith("(0.50 nats), Store hit rate: 60.0%")


PARENT = """
import multiprocessing, subprocess, sys
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
    environment = {k: v for k, v in os.environ.items() if k not in ("PROMETHEUS_MULTIPROC_DIR", server_folder.VARIABLE)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, check=True, env=environment
    )
    first, its_child, second, its_childs = done.stdout.split()
    assert first == its_child != second == its_childs
    assert not os.path.exists(first) and not os.path.exists(second), "removed at the end"


@pytest.fixture
def front_end(monkeypatch):
    """A process that hasn't made its folder yet; what it sets and registers is taken back."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    # To be set by the code under test, so that it is taken back.
    monkeypatch.setenv(server_folder.VARIABLE, "")
    monkeypatch.setattr(MultiProcessCollector, "collect", MultiProcessCollector.collect)
    # Earlier tests of this process may have made theirs.
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if any(name.startswith("aasd:") for name in names):
            REGISTRY.unregister(collector)
    registered = set(REGISTRY._collector_to_names)
    for made in (metrics.serving_folder, server_folder.server_folder):
        made.cache_clear()
    yield monkeypatch
    for made in (metrics.serving_folder, server_folder.server_folder):
        made.cache_clear()
    for collector in set(REGISTRY._collector_to_names) - registered:
        REGISTRY.unregister(collector)


def test_the_folder_is_private_and_its_metrics_are_on_the_page(front_end, publish):
    folder = metrics.serving_folder()
    assert os.stat(folder).st_mode & 0o777 == 0o700 and metrics.serving_folder() == folder
    publish(counters_with(3), folder)
    assert 'aasd:relaxed_tokens_total{engine="0",model_name="m"} 3.0' in generate_latest().decode()


def test_any_of_several_servers_shows_all_engines(front_end, publish, tmp_path):
    """As with --api-server-count: vLLM makes a registry with a multi-process collector for each request."""
    front_end.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    folder = metrics.serving_folder()
    for engine in range(2):
        publish(counters_with(3 + engine), folder, engine)
    registry = CollectorRegistry()
    page = generate_latest(MultiProcessCollector(registry) and registry).decode()
    assert 'aasd:relaxed_tokens_total{engine="0",model_name="m"} 3.0' in page
    assert 'aasd:relaxed_tokens_total{engine="1",model_name="m"} 4.0' in page
    assert "aasd:" not in generate_latest().decode() and list(tmp_path.iterdir()) == []


class FakeLLM:
    """As much of an `LLM` as the metrics are asked of; what workers answer comes by msgpack."""

    def __init__(self, aasd, answers=()):
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(aasd=aasd), model_config=SimpleNamespace(served_model_name="m")
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)
        answers = msgspec.msgpack.decode(msgspec.msgpack.encode(list(answers)))
        self.collective_rpc = {"aasd_metrics": answers}.__getitem__


def test_get_returns_vllms_own_kind_of_metrics():
    # A rank that isn't the first answers nothing.
    got = public.get(FakeLLM(object(), [(1, counted().read()), None]))
    labels = {"model_name": "m", "engine": "1"}
    assert got[:2] == [Counter("aasd:relaxed_tokens", labels, 1.0), Counter("aasd:regret_nats", labels, 0.5)]
    assert got[-3] == Counter("aasd:store_lookups", {**labels, "result": "hit"}, 6.0)
    with pytest.raises(ValueError, match="doesn't run with method 'aasd'"):
        public.get(FakeLLM(None))


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
