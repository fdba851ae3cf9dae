"""The options of a request: checked where vLLM accepts it, used where it is served.

They are `aasd_*` keys in ``SamplingParams.extra_args``, which the OpenAI API fills from ``vllm_xargs``. Every front end
of vLLM (`LLM`, the API server) has `SamplingParams.verify` check a request before it reaches the engine, and
passes the speculative config: there a bad option is the client's error, like a bad parameter of vLLM's. This runs in
the front end's process. If a request comes another way, the worker ignores its bad options.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_aasd.config import Settings
from vllm_aasd.engine import patching
from vllm_aasd.fields import PREFIX
from vllm_aasd.overrides import with_overrides

logger = logging.getLogger("vllm.aasd")


class RequestOptionsError(VLLMValidationError, ValueError):
    """A request asks for what it can't have: status 400 over HTTP, a ValueError from `LLM.generate`."""


def install() -> list[patching.Replacement]:
    """Have this process's front end check the options; does nothing if that was done before.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace({patching.VERIFY_SAMPLING_PARAMS: _patch_verify})


def _patch_verify(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def verify(
        self: SamplingParams,
        model_config: ModelConfig,
        speculative_config: SpeculativeConfig | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        stock(self, model_config, speculative_config, *args, **kwargs)
        server = getattr(speculative_config, "aasd", None)
        if server is None:
            return
        try:
            with_overrides(server, self.extra_args or {})
        except ValueError as error:
            # vLLM's class, which mypy doesn't follow, takes it.
            raise RequestOptionsError(str(error), parameter="extra_args") from None  # type: ignore[call-arg]

    return verify


def settings_of(params: SamplingParams | None, server: Settings) -> Settings:
    """The settings by which a worker serves a request; if an option is bad, all are ignored.

    Args:
        params: the request's; None for what isn't generation.
        server: the server's settings.
    """
    try:
        return with_overrides(server, (params and params.extra_args) or {})
    except ValueError:
        _warn_once()
        return server


@functools.cache
def _warn_once() -> None:
    # Without the value, which is the user's and doesn't belong in the log.
    logger.warning(
        "aasd: a request has %s* options that its front end should have refused (is the plugin installed there?); "
        "the server's settings serve it, and this isn't said again",
        PREFIX,
    )
