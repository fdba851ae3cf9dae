"""Where the Triton kernels run."""

import os

import torch


def gpu_kind() -> str:
    """The GPU platform of this torch build, "cuda" or "hip", which decides the launch options of kernels."""
    return "hip" if torch.version.hip else "cuda"


def runs_triton(device_type: str) -> bool:
    """Whether ops run their Triton kernels on a device.

    Args:
        device_type: `torch.device.type`. torch calls ROCm devices "cuda" too. With ``TRITON_INTERPRET=1``, which the
            tests set, "cpu" runs the kernels too.
    """
    return device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
