"""The entry point that vLLM calls in each of its processes."""

import logging

logger = logging.getLogger("vllm.aasd")


def register() -> None:
    """Make ``method: aasd`` known to vLLM, and the options that its requests may bring.

    Called by vLLM through ``vllm.general_plugins``, possibly several times a process. An exception here would
    end every vLLM command, so what goes wrong is logged and leaves vLLM as it was.
    """
    try:
        from vllm_aasd.engine import configuration, request_options

        configuration.install()
        request_options.install()
    except Exception:
        logger.exception("vllm-aasd could not register itself; method 'aasd' isn't available")
