"""Which implementation of an op runs on which device."""

import functools
import importlib
import logging
from types import ModuleType

logger = logging.getLogger(__name__)

# Device type -> suffix of the module that implements every op there.
_COMPILED = {"cpu": "cpu", "cuda": "triton"}


@functools.cache
def backend(op: str, device_type: str, twin_on: tuple[str, ...] = ()) -> ModuleType:
    """Return the module that implements an op on a device, and log the choice once.

    Args:
        op: name of the op's module, such as "verify".
        device_type: `torch.device.type`. Devices without a compiled path get the plain torch twin.
        twin_on: device types on which the twin runs whatever else is there.
    """
    name = "reference" if device_type in twin_on else _COMPILED.get(device_type, "reference")
    module = importlib.import_module(f"vllm_aasd.kernels.{op}_{name}")
    logger.info("AASD op '%s' on device '%s' runs on backend '%s'", op, device_type, name)
    return module
