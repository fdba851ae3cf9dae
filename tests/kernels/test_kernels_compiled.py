"""The Triton kernels compiled ahead of time, with the launches that the ops make: registers, loads, bytes."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from benchmarks import kernels
from benchmarks.launches import TARGETS, build, distinct, recorded

sys.path.remove(str(ROOT))

from vllm_aasd.kernels.common import rows_triton

# The kernels that read the logits.
READERS = {"row_statistics_kernel", "race_kernel", "partials_kernel"}
JOBS = {job.name: job for job in kernels.JOBS if job.reads_logits}
# (jobs, requests, drafts, vocabulary, dtype). One request takes narrow blocks, many take wide ones; these jobs
# launch every kernel.
QUICK = [
    (("verify, sampled, strict", "align"), 1, 8, 151936, torch.bfloat16),
    (("verify, greedy, conditional", "align, two shards"), 64, 8, 151936, torch.float32),
]
LONG = [
    (tuple(JOBS), num_reqs, num_drafts, vocab_size, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for num_reqs, num_drafts, vocab_size in [
        (1, 8, 151936), (64, 8, 151936), (1, 15, 262144), (64, 15, 262144), (1, 3, 50257), (64, 1, 32000),
    ]
]  # fmt: skip


def launches_of(target, jobs, num_reqs, num_drafts, vocab_size, dtype, row_stride=None):
    inputs = kernels.Inputs(num_reqs, num_drafts, vocab_size, dtype, row_stride)
    return distinct(launch for name in jobs for launch in recorded(JOBS[name].make(inputs), TARGETS[target]))


def check(launch, target):
    built = build(launch, TARGETS[target])
    what = f"{launch.name} {launch.sizes} on {target}: {built}"
    assert built.spill_bytes == built.stack_bytes == 0, what
    # A few scalars of many arguments may wait in a vector register, which touches no memory.
    assert built.parked_scalars <= (8 if launch.name == "decide_kernel" else 0), what
    assert built.registers > 0
    if launch.name in READERS:
        threads = built.num_warps * TARGETS[target].warp_size
        per_load = 32 if target == "sm_100" else 16
        itemsize = launch.args[{"race_kernel": 3}.get(launch.name, 0)].element_size()
        # All of a whole block; the end of a row is read so too if the vocabulary is a multiple of 16.
        assert built.wide_loads >= launch.kwargs["BLOCK"] * itemsize / threads / per_load, what


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_loads(target):
    """Every kernel for Hopper and MI300; for the others, to save time, those that read the logits."""
    for jobs, *shape in QUICK:
        for launch in launches_of(target, jobs, *shape):
            if launch.name in READERS or target in ("sm_90", "gfx942"):
                check(launch, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", LONG, ids=lambda case: "-".join(map(str, case[1:])))
def test_no_spills_and_wide_loads_of_any_shape(target, case):
    jobs, *shape = case
    # As vLLM pads a vocabulary.
    for launch in launches_of(target, jobs, *shape, row_stride=-(-shape[2] // 64) * 64):
        check(launch, target)


def test_the_check_sees_spills(monkeypatch):
    """256 logits a thread are too many for its registers."""
    monkeypatch.setattr(rows_triton, "WIDE", {"BLOCK": 8192, "num_warps": 1})
    launch = launches_of("sm_80", ["align"], 64, 0, 151936, torch.float32)[0]
    with pytest.raises(AssertionError, match="partials_kernel"):
        check(launch, "sm_80")
    built = build(launch, TARGETS["sm_80"])
    assert built.spill_bytes > 0 and built.stack_bytes > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_check_sees_narrow_loads(target):
    """Of rows whose stride is no multiple of 16."""
    with pytest.raises(AssertionError, match="wide_loads=0"):
        check(launches_of(target, ["align"], 1, 0, 50257, torch.float32)[0], target)


@pytest.mark.parametrize(
    ("job", "limit"),
    [
        ("verify, greedy, strict", 1.05),
        ("verify, greedy, conditional", 1.05),
        ("verify, sampled, conditional", 1.05),
        ("align", 1.05),
    ],
)
def test_bytes_moved_over_one_read_of_the_logits(interpreter, job, limit):
    """On narrow blocks, for which partial results weigh most."""
    counted = interpreter.call("aasd_testing.stock_v2:count_bytes", job, 2, 3, 32768)
    assert 1 <= counted["logits_bytes"] / counted["least_bytes"] <= 1.01
    assert counted["over_least"] <= limit


def test_no_request_asks_for_another_compilation():
    """Neither its stop tokens, nor where its rows begin in the batch, nor how many requests are remembered."""
    keys, made = {}, kernels.policy_tensors
    for stops, states, start in [(1, 4, 0), (3, 16, 4), (64, 40, 3)]:
        inputs = kernels.Inputs(16, 3, 151936, torch.bfloat16)
        inputs.stop_token_ids[:, :stops] = torch.arange(stops)
        for name in ("token_ids", "slot_mapping", "draft_sampled", "pos", "expanded_idx_mapping", "expanded_local_pos"):
            tensor = getattr(inputs, name)
            setattr(inputs, name, torch.cat([tensor[:start], tensor])[start:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                kernels, "policy_tensors", lambda *args, n=states: made(*args)._replace(state=torch.zeros(n, 4))
            )
            ops = [JOBS[name].make(inputs) for name in ("verify, sampled, conditional", "align", "align, two shards")]
        for launch in [launch for op in ops for launch in recorded(op)]:
            keys.setdefault((launch.name, launch.sizes), set()).add(str(launch.specialization(TARGETS["sm_90"])[1:]))
    assert len(keys) == 8 and {name: len(each) for name, each in keys.items() if len(each) > 1} == {}


def test_sizes_of_one_compile():
    """Triton makes constants of arguments that are 1: one row, one block, one stop token, one slot."""
    inputs = kernels.Inputs(1, 0, 111, torch.float32)
    inputs.stop_token_ids = inputs.stop_token_ids[:, :1].contiguous()
    for name in ("verify, sampled, conditional", "align"):
        for launch in recorded(JOBS[name].make(inputs), TARGETS["gfx942"]):
            assert build(launch, TARGETS["gfx942"]).registers > 0
