"""vLLM's own asynchronous scheduler with our draft lengths, before a simulated device with a clock of its own."""

import collections
import types

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from aasd_testing.device import Device
from vllm_aasd.drafting.batch_draft_length import BatchDraftLength
from vllm_aasd.engine import configuration, draft_length_schedule
from vllm_aasd.engine.failsafe import MAX_FAULTS
from vllm_aasd.engine.scheduler import AASDScheduler

BLOCK_SIZE, NUM_BLOCKS = 16, 4000
PROMPT, ANSWERS = 40, (50, 250)


@pytest.fixture
def vllm_config(demo_model, on_v2):
    """Builds the configuration of an engine that schedules asynchronously."""
    replacements = configuration.install()

    def build(**keys):
        args = EngineArgs(
            model=demo_model, speculative_config={"method": "aasd", **keys}, max_num_seqs=64, max_model_len=2048,
            max_num_batched_tokens=2048, enable_prefix_caching=False,
        )  # fmt: skip
        config = args.create_engine_config()
        config.scheduler_config.async_scheduling = True
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        return config

    yield build
    for replacement in replacements:
        replacement.undo()


class Served:
    """A scheduler as vLLM's engine calls it: the next step is scheduled before one's output is there."""

    def __init__(self, vllm_config, device, monkeypatch):
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = AASDScheduler(
            vllm_config,
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
        )
        self.device = device
        self.now = self.idle_from = 0.0
        self.widths, self.num_tokens, self._number = [], 0, 0
        self._rng = np.random.default_rng(1)
        self._under_way = collections.deque()
        monkeypatch.setattr(draft_length_schedule, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def run(self, num_requests, num_steps):
        """Keep so many requests busy. Returns tokens by second."""
        began, self.num_tokens = self.now, 0
        for _ in range(num_steps):
            for _ in range(num_requests - len(self.scheduler.requests)):
                self._number += 1
                params = SamplingParams(max_tokens=int(self._rng.integers(*ANSWERS)), temperature=0.0)
                params.update_from_generation_config({}, 0)
                self.scheduler.add_request(Request(str(self._number), list(range(PROMPT)), params, None))
            self._under_way.append(self.scheduler.schedule())
            if len(self._under_way) == 2:
                self._finish(self._under_way.popleft())
        return self.num_tokens / (self.now - began)

    def _finish(self, step):
        drafts = step.scheduled_spec_decode_tokens
        req_ids = list(step.num_scheduled_tokens)
        width = max(map(len, drafts.values()), default=0)
        accepted = dict(zip(drafts, self.device.accepted(len(drafts), width), strict=True)) if width else {}
        sampled = []
        for req_id in req_ids:
            request = self.scheduler.requests.get(req_id)
            room = request.max_tokens - request.num_output_tokens if request else 1
            sampled.append([7] * min(1 + min(accepted.get(req_id, 0), len(drafts.get(req_id, ()))), room))
        self.now += self.device.seconds(len(req_ids), width)
        output = ModelRunnerOutput(req_ids, {req_id: row for row, req_id in enumerate(req_ids)}, sampled)
        self.scheduler.update_from_output(step, output)
        self.num_tokens += sum(map(len, sampled))
        self.widths.append(width)


@pytest.mark.parametrize(
    ("accepts", "cost", "num_requests"),
    [((0.0, 0.0), 0.02, 4), ((0.8, 0.9), 0.002, 24)],
)
def test_vllms_scheduler_comes_to_ask_for_what_pays(vllm_config, monkeypatch, accepts, cost, num_requests):
    device = Device(*accepts, cost, hiccups=0.0)
    served = Served(vllm_config(), device, monkeypatch)
    served.run(num_requests, 400)
    found = served.run(num_requests, 400)
    none = Served(vllm_config(num_speculative_tokens_per_batch_size=[[1, 64, 0]]), device, monkeypatch)
    none.run(num_requests, 200)
    found /= none.run(num_requests, 400)
    assert set(none.widths) == {0}
    best = max(device.speed_up(num_requests, width) for width in (0, 1, 3, 7))
    assert found > 0.97
    # Prompts and ends of answers, where drafts are of no use, take their part.
    assert found > 0.85 * best
    if best == 1:
        assert np.mean(served.widths[-200:]) < 0.5


def test_it_says_that_it_is_live_and_begins_with_the_schedule(vllm_config, monkeypatch):
    said = []
    monkeypatch.setattr(draft_length_schedule.logger, "info", said.append)
    served = Served(vllm_config(), Device(0.5, 0.8, 0.0), monkeypatch)
    assert any("is live: the scheduler" in message for message in said)
    served.run(3, 4)
    assert served.widths[-1] == 7
    assert [served.scheduler.dynamic_sd_lookup[num_requests] for num_requests in (63, 64)] == [1, 1], "the most, too"


def test_a_mixture_of_experts_begins_low_and_looks_up(vllm_config, monkeypatch):
    served = {}
    for is_moe in (False, True):
        config = vllm_config()
        monkeypatch.setattr(type(config.model_config), "is_moe", is_moe)
        served[is_moe] = Served(config, Device(0.9, 0.95, 0.0, hiccups=0.0), monkeypatch)
    assert [served[False].scheduler.dynamic_sd_lookup[n] for n in (1, 8, 9)] == [7, 3, 3]
    assert [served[True].scheduler.dynamic_sd_lookup[n] for n in (1, 8, 9)] == [1, 1, 0]
    served[True].run(8, 800)
    assert np.mean(served[True].widths[-100:]) > 5


def test_no_step_with_drafts_is_larger_than_the_graphs(vllm_config, monkeypatch):
    """Its CUDA graph isn't there, and nobody has measured the memory of so many logits."""
    widths = []
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL_AND_PIECEWISE):
        config = vllm_config()
        config.compilation_config.cudagraph_mode = mode
        config.compilation_config.max_cudagraph_capture_size = 24
        served = Served(config, Device(0.9, 0.95, 0.0, hiccups=0.0), monkeypatch)
        served.run(8, 500)
        widths.append(max(served.widths))
    assert widths == [7, 1]


@pytest.mark.parametrize("keys", [{"num_speculative_tokens_per_batch_size": [[1, 64, 3]]}, {"aasd_draft_length": 3}])
def test_what_the_user_fixes_stays(vllm_config, monkeypatch, keys):
    served = Served(vllm_config(**keys), Device(0.0, 0.0, 0.5), monkeypatch)
    served.run(4, 200)
    assert set(served.widths[3:]) <= {0, 3} and served.widths.count(3) > 150


@pytest.mark.parametrize("failing", ["choose", "observe"])
def test_a_fault_costs_no_step(vllm_config, monkeypatch, failing):
    served = Served(vllm_config(), Device(0.0, 0.0, 0.1), monkeypatch)
    calls = []

    def fail(self, *args):
        calls.append(args)
        raise RuntimeError("injected")

    monkeypatch.setattr(BatchDraftLength, failing, fail)
    assert served.run(4, 60) > 0
    assert len(calls) == MAX_FAULTS, "then it is off"
    assert served.widths[-1] == 7, "as it began"


def test_the_time_of_a_step_is_the_devices(vllm_config, monkeypatch):
    """It waits behind the one before, which isn't its own time; and for requests, which is nobody's."""
    steps = []
    monkeypatch.setattr(BatchDraftLength, "observe", lambda self, *args: steps.append(args))
    device = Device(0.0, 0.0, 0.0)
    device.seconds = lambda num_requests, width: 0.02
    served = Served(vllm_config(), device, monkeypatch)
    served.run(2, 10)
    while served._under_way:
        served._finish(served._under_way.popleft())
    served.now += 5.0
    served.run(2, 10)
    assert [(num_requests, num_new) for num_requests, num_new, *_ in steps] == [(2, 2)] + [(2, 0)] * (len(steps) - 1)
    known = [seconds for *_, seconds in steps if seconds is not None]
    assert len(steps) - len(known) == 1, "the prompts'"
    assert known == pytest.approx([0.02] * len(known)) and len(known) > 15
