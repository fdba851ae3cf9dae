"""What the CPU of this machine can do."""

from pathlib import Path

# What arithmetic in bfloat16 needs on x86; elsewhere PyTorch has it.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def emulates_bfloat16(described: str | None = None) -> bool:
    """Whether PyTorch only emulates bfloat16 on the CPU, several times slower than float32: on older x86 CPUs.

    Args:
        described: as Linux describes the CPU in ``/proc/cpuinfo``; by default what it says here.
    """
    if described is None:
        path = Path("/proc/cpuinfo")
        described = path.read_text() if path.exists() else ""
    flags = next((line.split() for line in described.splitlines() if line.startswith("flags")), None)
    return flags is not None and not _BFLOAT16_FLAGS & set(flags)
