"""Which implementation of an op runs on which device."""

import functools
import importlib
import logging
import os
from types import ModuleType

logger = logging.getLogger(__name__)

# By op: the reference, and by device type what is compiled for it; "cuda" is what torch calls ROCm too.
_MODULES = {
    "align": {"reference": "align.reference", "cpu": "align.cpu", "cuda": "align.triton"},
    "align_shard": {"reference": "align.shard_reference", "cuda": "align.shard_triton"},
    "count": {"reference": "count.cpu", "cuda": "count.triton"},
    "draft": {"reference": "draft.reference", "cuda": "draft.triton"},
    "recovered": {"reference": "verify.recovered_reference", "cpu": "verify.recovered_cpu"},
    "verify": {"reference": "verify.reference", "cpu": "verify.cpu"},
    "verify_seeded": {"reference": "verify.seeded_reference", "cuda": "verify.triton"},
}


@functools.cache
def backend(op: str, device_type: str) -> ModuleType:
    """Return the module that implements an op on a device, and log the choice once.

    Under TRITON_INTERPRET=1, which tests set, the CPU runs the Triton kernels of the ops that have some.

    Args:
        op: name of the op's module, such as "verify".
        device_type: `torch.device.type`. Devices without a compiled path get the plain torch twin.
    """
    modules = _MODULES[op]
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    name = modules.get("cuda" if interpreted and "cuda" in modules else device_type, modules["reference"])
    logger.info("AASD op '%s' on device '%s' runs on %s", op, device_type, name)
    return importlib.import_module(f"vllm_aasd.kernels.{name}")
