"""Which implementation of an op runs on which device."""

import functools
import importlib
import logging
from types import ModuleType

logger = logging.getLogger(__name__)

# Device type -> suffix of the module that implements every op there.
_COMPILED = {"cpu": "cpu"}


@functools.cache
def backend(op: str, device_type: str) -> ModuleType:
    """Return the module that implements an op on a device, and log the choice once.

    Args:
        op: name of the op's module, such as "verify".
        device_type: `torch.device.type`. Devices without a compiled path get the plain torch twin.
    """
    name = _COMPILED.get(device_type, "reference")
    module = importlib.import_module(f"vllm_aasd.kernels.{op}_{name}")
    logger.info("AASD op '%s' on device '%s' runs on backend '%s'", op, device_type, name)
    return module
