"""Kernel launches without a GPU: record what an op launches, and compile exactly that ahead of time.

`recorded` runs an op on CPU tensors while Triton's launcher only takes notes. Argument types, the alignment
of pointers and strides, constants and warps are then those of the real launch, because Triton's own binder
derives them; nothing about a kernel is written a second time. `build` compiles one such launch for a target
and reads from the machine code what it costs.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its op made it."""

    kernel: jit.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__.strip("_")

    @property
    def sizes(self) -> str:
        """The constants that the kernel is compiled for."""
        return " ".join(f"{name}={value}" for name, value in self.kwargs.items() if name.isupper())

    def specialization(self, target: GPUTarget) -> tuple[Any, ...]:
        """Options, signature, constants and attributes, as Triton's launcher derives them."""
        backend = make_backend(target)
        kernel = self.kernel
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*self.args, **self.kwargs)
        return kernel._pack_args(backend, self.kwargs, bound, specialization, options)


@dataclasses.dataclass(frozen=True)
class Build:
    """What one launch's machine code costs on one target.

    Attributes:
        registers: per thread; vector registers on AMD.
        shared_bytes: of a program.
        spill_bytes: registers spilled to memory, per thread; on AMD 4 bytes for each vector register.
        stack_bytes: local memory per thread.
        parked_scalars: on AMD, scalars kept in the lanes of vector registers, which touches no memory.
        num_warps: of a program.
        wide_loads: global load instructions of 16 bytes per thread, or 32, which sm_100 has.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    parked_scalars: int
    num_warps: int
    wide_loads: int


def recorded(op: Callable[[], Any], target: GPUTarget = TARGETS["sm_90"]) -> list[Launch]:
    """Run an op on CPU tensors, launching nothing, and return its launches; what it returns is garbage.

    Args:
        op: to run.
        target: the GPU that the op is to believe in.
    """
    launches: list[Launch] = []

    def take_note(kernel: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, tuple(grid), args, kwargs))

    on_hip = "7.0" if target.backend == "hip" else None
    with mock.patch.object(jit.JITFunction, "run", take_note), mock.patch.object(torch.version, "hip", on_hip):
        op()
    return launches


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Drop launches that run the machine code of an earlier one."""
    found: dict[Any, Launch] = {}
    for launch in launches:
        _, signature, constexprs, attrs = launch.specialization(TARGETS["sm_90"])
        found.setdefault((launch.kernel, str((signature, constexprs, attrs, launch.sizes))), launch)
    return list(found.values())


def compiled_kernel(launch: Launch, target: GPUTarget, **overrides: Any) -> Any:
    """Compile a launch for a target, with the specialisation that the launcher would give it.

    Args:
        launch: to compile.
        target: to compile for.
        **overrides: launch options to replace.
    """
    options, signature, constexprs, attrs = launch.specialization(target)
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options={**vars(options), **overrides})


def build(launch: Launch, target: GPUTarget, **overrides: Any) -> Build:
    """What a launch costs on a target; the arguments are those of `compiled_kernel`."""
    compiled = compiled_kernel(launch, target, **overrides)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "hip":
        return _from_amdgcn(compiled.asm["amdgcn"], shared, warps)
    return _from_cubin(compiled.asm["cubin"], shared, warps)


def _from_cubin(cubin: bytes, shared: int, warps: int) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\bLDG\.[A-Z0-9.]*", sass)
    wide = sum(".128" in load or ".256" in load for load in loads)
    # Spills are loads and stores of local memory, which has a stack frame without them too.
    spills = sum(_width(access) for access in re.findall(r"\bSTL[A-Z0-9.]*", sass))
    stack = resources["STACK"] + resources["LOCAL"]
    return Build(resources["REG"], shared, spills, stack, 0, warps, wide)


def _from_amdgcn(assembly: str, shared: int, warps: int) -> Build:
    def number(field: str) -> int:
        return int(re.findall(rf"\.{field}:\s+(\d+)", assembly)[0])

    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly)
    wide = sum(load == "dwordx4" for load in loads)
    spills, stack = 4 * number("vgpr_spill_count"), number("private_segment_fixed_size")
    return Build(number("vgpr_count"), shared, spills, stack, number("sgpr_spill_count"), warps, wide)


def _width(access: str) -> int:
    width = re.search(r"\.(64|128)", access)
    return int(width[1]) // 8 if width else 4


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
