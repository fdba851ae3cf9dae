"""What the V2 adapter asks of the device in a step: nothing that is waited for, and nothing that grows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.sampling_params import SamplingParams

from aasd_testing.fake_v2 import PROMPTS, WIDTH, FakeRunner, serve, target_alone
from benchmarks.launches import recorded
from vllm_aasd.kernels import align
from vllm_aasd.kernels.draft import batch as draft_batch
from vllm_aasd.kernels.text import batch as text_batch
from vllm_aasd.kernels.verify import seeded as verify_seeded

STRICT = {"verification": "strict"}


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


@pytest.fixture
def launches(monkeypatch):
    """Our kernels' references stand for launches of kernels: what they do inside isn't watched. All launches."""
    launched = []
    for module in (align, draft_batch, text_batch, verify_seeded):
        both = Unwatched(module._implementation("cpu"), module._implementation("cuda"), launched)
        monkeypatch.setattr(module, "_implementation", lambda device, both=both: both)
    return launched


class Unwatched:
    """A module of references, whose functions a `Watch` doesn't see into; what the kernels' module launches is kept."""

    def __init__(self, references, kernels, launched):
        self._references, self._kernels, self._launched = references, kernels, launched

    def __getattr__(self, name):
        def call(*args):
            Watch.is_off = True
            try:
                self._launched += recorded(lambda: getattr(self._kernels, name)(*args))
                return getattr(self._references, name)(*args)
            finally:
                Watch.is_off = False

        return call


class Watch(TorchDispatchMode):
    """Sees every operation that PyTorch is asked for."""

    is_off = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not Watch.is_off:
            self.see(str(function), args, result)
        return result


class NoSynchronization(Watch):
    """Fails on what would wait for a GPU: a number read on the host, a shape that depends on values."""

    # In inference mode `item` comes as such, and `tolist` and `numpy` come as `resolve_conj`.
    FORBIDDEN = (
        "_local_scalar_dense",
        "aten.item",
        "resolve_conj",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave.Tensor",
        "equal.",
    )

    def see(self, function, args, result):
        assert not any(name in function for name in self.FORBIDDEN), f"{function} waits for the device"
        if "aten.index" in function and isinstance(args[1], list | tuple):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{function} with a mask waits for the device"


class LargestTensor(Watch):
    """Notes the bytes of the largest tensor that an operation returns."""

    def __init__(self, into):
        super().__init__()
        self._into = into
        into.append(0)

    def see(self, function, args, result):
        if isinstance(result, torch.Tensor):
            self._into[-1] = max(self._into[-1], result.nbytes)


class NumLaunches(Watch):
    """Counts the operations of PyTorch that launch something: all that make no view and allocate no memory."""

    NONE = ("empty", "view", "slice", "select", "alias", "detach", "as_strided", "unsqueeze", "expand", "lift_fresh")

    def __init__(self, into):
        super().__init__()
        self._into = into
        into.append([])

    def see(self, function, args, result):
        if not any(name in function for name in self.NONE):
            self._into[-1].append(function)


@pytest.mark.parametrize(("temperature", "verification"), [(0.0, 2), (1.0, 4)])
@pytest.mark.parametrize("width", [WIDTH, 0])
def test_how_much_a_step_launches(launches, temperature, verification, width):
    """vLLM's own rejection sampler launches four kernels, for greedy requests too; its n-gram drafter two."""
    runner = FakeRunner(max_num_reqs=4)
    for slot in range(4):
        runner.add(slot, PROMPTS[0], 40, SamplingParams(temperature=temperature, max_tokens=40))
    runner.step([0, 1, 2, 3])
    runner.width = width
    operations = []
    runner.watch = lambda: NumLaunches(operations)
    for _ in range(3):
        launches.clear()
        runner.step([0, 1, 2, 3])
    names = [launch.name for launch in launches]
    verify = ["row_statistics_kernel", "decide_kernel", "race_kernel", "finish_kernel"][:verification]
    assert names == [*verify, "learn_and_begin_kernel", "write_kernel", "draft_kernel"]
    assert operations == [[]] * 6, "and nothing beside"


def test_nothing_waits_for_the_device(launches):
    runner = FakeRunner(alignment=True, **STRICT)
    runner.watch = NoSynchronization
    serve(runner, PROMPTS, chunk=3)
    assert sum(runner.accepted) > 0
    with NoSynchronization(), pytest.raises(AssertionError, match=r"local_scalar_dense.* waits for the device"):
        runner.total_len.max().item()
    with NoSynchronization(), pytest.raises(AssertionError, match="with a mask waits"):
        runner.total_len[runner.total_len > 0]


def test_what_a_step_makes_does_not_grow_with_the_context(launches):
    runner = FakeRunner(max_num_reqs=1, **STRICT)
    prompt = [1, 2, *target_alone([1, 2], 4)]
    runner.add(0, prompt, 40, SamplingParams(temperature=0.0, max_tokens=40))
    largest = []
    runner.watch = lambda: LargestTensor(largest)
    for _ in range(6):
        runner.step([0])
    # Two watches a step: the verifier's and the speculator's. The first step reads the prompt.
    assert len(largest) == 12 and max(largest) > 0
    assert len(set(largest[2::2])) == len(set(largest[3::2])) == 1
