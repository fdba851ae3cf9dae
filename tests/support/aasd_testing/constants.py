"""Settings of a fake runner, and constants that the product fixes and a test turns."""

import dataclasses
from typing import Any

from vllm_aasd.config import Settings
from vllm_aasd.kernels.verify.policies import FLOOR
from vllm_aasd.verification.rules import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnedSettings(Settings):
    """Settings under which the rules have another floor."""

    floor: float = 0.3

    def policy(self) -> Policy:
        policy = super().policy()
        parameters = list(policy.parameters)
        parameters[FLOOR] = self.floor
        return policy._replace(parameters=tuple(parameters))


def with_constants(given: dict[str, Any], defaults: dict[str, Any]) -> Settings:
    """The settings that a test gives over the fake's defaults; ``floor`` may be one of them.

    ``min_survival`` is left to the fake, which turns it where the drafter is made.
    """
    kind = TurnedSettings if "floor" in given else Settings
    return kind(**{name: value for name, value in {**defaults, **given}.items() if name != "min_survival"})
