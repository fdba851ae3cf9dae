"""Which implementation of an op runs on which device."""

import functools
import importlib
import logging
import os
from types import ModuleType

logger = logging.getLogger(__name__)

# By op, device type -> suffix of the module that implements it there; "cuda" is what torch calls ROCm too.
_COMPILED = {
    "align": {"cpu": "cpu", "cuda": "triton"},
    "align_shard": {"cuda": "triton"},
    "count": {"cpu": "cpu", "cuda": "triton"},
    "draft": {"cuda": "triton"},
    "redraw": {"cpu": "cpu"},
    "verify": {"cpu": "cpu"},
    "verify_seeded": {"cuda": "triton"},
}


@functools.cache
def backend(op: str, device_type: str) -> ModuleType:
    """Return the module that implements an op on a device, and log the choice once.

    Under TRITON_INTERPRET=1, which tests set, the CPU runs the Triton kernels of the ops that have some.

    Args:
        op: name of the op's module, such as "verify".
        device_type: `torch.device.type`. Devices without a compiled path get the plain torch twin.
    """
    compiled = _COMPILED[op]
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    name = compiled.get("cuda" if interpreted and "cuda" in compiled else device_type, "reference")
    module = importlib.import_module(f"vllm_aasd.kernels.{op}_{name}")
    logger.info("AASD op '%s' on device '%s' runs on backend '%s'", op, device_type, name)
    return module
