"""The GPU that is checked: what it is, its clock, its graphs, and what Triton compiles for it."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
"""More than any L2 cache: what is written between two timed calls, so that each finds a cold one."""


class Skipped(Exception):
    """A check can't be made here; the text says why."""


def compile_events() -> list[tuple[str, float]]:
    """A list to which Triton adds the name and the seconds of each kernel that it compiles from now on."""
    from triton import knobs

    events: list[tuple[str, float]] = []

    def note(*, src: Any, times: Any, **unused: Any) -> None:
        events.append((getattr(src, "name", "?"), times.total / 1e6))

    knobs.compilation.listener = note
    return events


class Gpu:
    """The current CUDA or ROCm device. Tests have a stand-in, on which kernels are interpreted.

    Attributes:
        compiled: see `compile_events`.
    """

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.compiled = compile_events()
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def describe(self) -> str:
        """The device, its driver, and the libraries."""
        import triton

        device = torch.cuda.get_device_properties(self.device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
        return (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors, "
            f"CUDA {torch.version.cuda or torch.version.hip}, driver for {driver}, torch {torch.__version__}, "
            f"Triton {triton.__version__}"
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def allocated(self) -> int:
        """Bytes of all tensors."""
        return torch.cuda.memory_allocated()

    def captured(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture a call, which has run before, in a CUDA graph: its output, and what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        return output, graph.replay

    def aside(self, call: Callable[[], Any]) -> Any:
        """The output of a call on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = call()
        torch.cuda.current_stream().wait_stream(stream)
        return output

    @contextlib.contextmanager
    def no_synchronization(self) -> Iterator[None]:
        """What waits for the device in this context raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            raise AssertionError(str(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def microseconds(self, call: Callable[[], Any], repetitions: int = 15) -> float:
        """Median time of a call on the device, with a cold L2 cache; the host's part is left out by a graph."""
        call()
        _, replay = self.captured(call)
        times = []
        for _ in range(repetitions):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        return statistics.median(times)

    def host_microseconds(self, call: Callable[[], Any], repetitions: int = 15) -> float:
        """Median time of a call on the host, which doesn't wait for the device."""
        times = []
        for _ in range(repetitions):
            self.synchronize()
            begin = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - begin))
        return statistics.median(times)

    def launches(self, call: Callable[[], Any]) -> int:
        """Kernels, copies and fills that a call gives the device; 0 where they can't be profiled."""
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            self.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())

    def bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written."""
        half = _FLUSH_BYTES // 2
        source, target = self._flush[:half], torch.empty(half, dtype=torch.int8, device=self.device)
        return 2 * half / self.microseconds(lambda: target.copy_(source)) * 1e6
