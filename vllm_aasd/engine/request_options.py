"""Reads and checks the options of a request, and decides how it is verified.

The options are `aasd_*` keys in ``SamplingParams.extra_args``, which the OpenAI API fills from ``vllm_xargs``. Every
front end of vLLM (`LLM`, the API server) calls `SamplingParams.verify` with the speculative config before a request
reaches the engine. A bad option is refused there, like a bad sampling parameter. If a request arrives in another way,
the worker ignores bad options.
"""

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, SamplingType

from vllm_aasd.config import PREFIX, Settings, with_overrides
from vllm_aasd.engine import patching
from vllm_aasd.engine.corpus_names import check_names
from vllm_aasd.kernels.verify.policies import MAX_STOP_TOKEN_IDS, STRICT
from vllm_aasd.predicted_tokens import OPTION as PREDICTION
from vllm_aasd.verification.rules import STRICT_POLICY, Policy

logger = logging.getLogger("vllm.aasd")


class RequestOptionsError(VLLMValidationError, ValueError):
    """A request's options aren't allowed: status 400 over HTTP, a ValueError from `LLM.generate`."""


def install() -> list[patching.Replacement]:
    """Have this process's front end check options, and keep predictions out of its log; a second call does nothing.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM has changed; then nothing was replaced.
    """
    return patching.replace(
        {patching.VERIFY_SAMPLING_PARAMS: _patch_verify, patching.SAMPLING_PARAMS_REPR: _patch_repr}
    )


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
            asked = with_overrides(server, self.extra_args or {})
            if asked.default_corpora is not server.default_corpora:
                check_names(speculative_config, asked.asked_corpora)
            if asked.drafter == "model" and getattr(speculative_config, "aasd_draft_model", None) is None:
                raise ValueError(
                    f"The request's {PREFIX}drafter is not allowed: the server has no draft model, so it takes "
                    "'both' or 'text'."
                )
        except ValueError as error:
            # mypy doesn't see vLLM's class, which has this parameter.
            raise RequestOptionsError(str(error), parameter="extra_args") from None  # type: ignore[call-arg]

    return verify


def _patch_repr(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def __repr__(self: SamplingParams) -> str:
        # vLLM logs it with ``--enable-log-requests``, and of the running requests when an engine dies.
        if PREDICTION in (self.extra_args or {}):
            self = copy.copy(self)
            self.extra_args = {**self.extra_args, PREDICTION: "..."}
        return stock(self)

    return __repr__


def settings_of(params: SamplingParams | None, server: Settings) -> Settings:
    """The settings that a worker serves a request with; if one option is bad, all are ignored.

    Args:
        params: the request's; None if it doesn't generate.
        server: the server's settings.
    """
    try:
        return with_overrides(server, (params and params.extra_args) or {})
    except ValueError:
        _warn_once()
        return server


class Verification(NamedTuple):
    """How a request is verified.

    Attributes:
        policy: decides which draft tokens are accepted.
        stop_token_ids: the distinct ids that end it; empty under a strict policy, which doesn't need them.
    """

    policy: Policy
    stop_token_ids: list[int]

    @property
    def is_strict(self) -> bool:
        """Whether its output is exactly the target's."""
        return self.policy.rule == STRICT


def strict() -> Verification:
    """The verification of a request about which nothing is known."""
    return Verification(STRICT_POLICY, [])


def verification_of(settings: Settings, params: SamplingParams | None) -> Verification:
    """Decide how a request is verified.

    Args:
        settings: the request's.
        params: the request's; None if it doesn't generate.

    Returns:
        The verification that the settings ask for, or strict verification in these cases: the request has structured
        output (including tool calls that vLLM constrains by a grammar) or log-probabilities, which promise the target's
        own output; it is sampled, and the settings relax greedy requests only; or it has more than `MAX_STOP_TOKEN_IDS`
        stop tokens.
    """
    policy = settings.policy()
    stop_token_ids = [] if params is None else sorted(params.all_stop_token_ids)
    if params is not None and (params.structured_outputs is not None or params.num_logprobs is not None):
        return strict()
    is_greedy = params is None or params.sampling_type is SamplingType.GREEDY
    if not policy.relaxes(is_greedy) or len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        return strict()
    return Verification(policy, stop_token_ids)


def changes_with_drafts(params: SamplingParams | None) -> bool:
    """Whether vLLM's V1 sampler changes the output of a request with these parameters if it has drafts."""
    if params is None:
        return False
    return bool(params.logprob_token_ids) or params.thinking_token_budget is not None


def longest_draft(request: Any, num_tokens: int, max_draft_tokens: int) -> int:
    """How many tokens may be drafted for a request.

    Args:
        request: vLLM's runner's or scheduler's state of it.
        num_tokens: in its context.
        max_draft_tokens: the longest draft of any request.
    """
    params = request.sampling_params
    if params is None:
        return max_draft_tokens
    num_emitted = num_tokens - request.num_prompt_tokens
    limit = max_draft_tokens
    if params.max_tokens is not None:
        # One token comes without a draft.
        limit = min(limit, params.max_tokens - num_emitted - 1)
    if params.min_tokens > num_emitted and params.all_stop_token_ids:
        # vLLM doesn't let a step's bonus token stop the request if `min_tokens` weren't reached before its drafts.
        limit = min(limit, params.min_tokens - num_emitted - 1)
    return max(0, limit)


@functools.cache
def _warn_once() -> None:
    # Without the value, which is user data.
    logger.warning(
        "aasd: a request has invalid %s* options, which its front end should have refused (is the plugin installed "
        "there?). The server's settings are used instead; this is logged once.",
        PREFIX,
    )
