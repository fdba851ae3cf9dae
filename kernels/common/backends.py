"""Where the Triton kernels run."""

import os

import torch


def gpu_kind() -> str:
    """The kind of GPU that this build of torch is for, by which launch options are chosen: "cuda" or "hip"."""
    return "hip" if torch.version.hip else "cuda"


def runs_triton(device_type: str) -> bool:
    """Whether ops that have Triton kernels run them on a device.

    Args:
        device_type: `torch.device.type`; "cuda" is what torch calls ROCm too. Under ``TRITON_INTERPRET=1``, which
            tests set, the CPU runs them too.
    """
    return device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
