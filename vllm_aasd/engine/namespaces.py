"""Who shares text with whom: requests that share vLLM's prefix cache, and no others.

vLLM isolates tenants by the ``cache_salt`` of their requests, and adapters by their name. The scheduler's process is
the only one that knows the salt of every request; it turns both into a number, the *namespace*, which travels to the
workers among the request's own sampling parameters. A client can't choose it: the scheduler writes over whatever stands
there.
"""

import hashlib
import secrets

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_aasd.config import Settings
from vllm_aasd.predicted_tokens import OPTION as PREDICTION

_KEY = "vllm_aasd.namespace"


class Namespaces:
    """Assigns namespaces; one for each engine."""

    def __init__(self) -> None:
        # Without it, a client can't compute a salt that leads to another's namespace.
        self._secret = secrets.token_bytes(32)
        self._resets = 0

    def assign(self, request: Request) -> None:
        """Write a request's namespace where the workers find it."""
        params = request.sampling_params
        if params is None:
            return
        adapter = request.lora_request.lora_name if request.lora_request is not None else ""
        key = repr((self._resets, adapter, request.cache_salt or "")).encode()
        digest = hashlib.blake2b(key, digest_size=8, key=self._secret).digest()
        # Not in place: a front end in the same process may hold the same dictionary.
        params.extra_args = {**(params.extra_args or {}), _KEY: int.from_bytes(digest, "little") >> 1}

    def reset(self) -> None:
        """Let no later request share text with those so far."""
        self._resets += 1


def namespace_of(params: SamplingParams | None) -> int | None:
    """The namespace of a request, 0 to 2**63 - 1; None if it has none and shares nothing.

    Args:
        params: the request's, as a worker gets them from our scheduler.
    """
    return ((params and params.extra_args) or {}).get(_KEY)


def shared_namespace(params: SamplingParams | None, settings: Settings) -> int | None:
    """The namespace whose earlier answers a request reads and adds to; None if its settings keep it out of them.

    Args:
        params: the request's, as for `namespace_of`.
        settings: the request's.
    """
    return None if settings.memory == "off" else namespace_of(params)


def prediction_of(params: SamplingParams | None) -> np.ndarray | None:
    """The token ids that the client of a request expects, ``[n]`` int32; None without such, or if they are none."""
    prediction = ((params and params.extra_args) or {}).get(PREDICTION)
    if not isinstance(prediction, list):
        return None
    try:
        token_ids = np.array(prediction, np.int32)
    except (OverflowError, TypeError, ValueError):
        return None
    return token_ids if token_ids.ndim == 1 and len(token_ids) else None
