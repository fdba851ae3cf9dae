"""Verification on the V2 model runner, for vLLM's ``rejection_sample``.

vLLM's `RejectionSampler` still gathers the draft tokens, marks those that a grammar forbids, and applies penalties,
bad words, temperature, top-k and top-p before our verifier, and it reports log-probabilities after it. Unlike vLLM's
plain sampler, it leaves out those of ``logprob_token_ids``; two patches here add them.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_aasd.engine import patching
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v2.requests import RequestSlots
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID
from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

logger = logging.getLogger("vllm.aasd")

_active: ContextVar["V2Verifier | None"] = ContextVar("aasd_v2_verifier", default=None)

# Parameters of vLLM's function that our verifier doesn't have, with the values that make vLLM do the same as ours.
_UNSUPPORTED = {
    "draft_logits": None,
    "synthetic_conditional_rates": None,
    "use_fp64": False,
    "use_block_verification": False,
    "contexts": None,
    "watermarking": None,
    "watermarking_skip_mask": None,
    "watermark_key": None,
    "fly_window_size": 0,
}
_SUPPORTED = tuple(name for name in patching.V2_REJECTION_SAMPLE.parameters if name not in _UNSUPPORTED)


class V2Verifier:
    """Verifies one worker's batches on the device, by the policy of each request.

    Args:
        num_drafts: ``[max_num_reqs]`` int32 by request index, kept up to date by the owner: how many of the
            request's draft columns are draft tokens. The others are fillers, which the runner needs to be valid ids.
        survival: ``[max_num_reqs, width]`` float32 by request index, kept up to date by the owner: what was promised.
        requests: policies and stop tokens.
        faults: of the worker.
        totals: where steps are counted, see `vllm_aasd.kernels.count`. Those that vLLM's own sampler verifies aren't.

    Attributes:
        contained: around `rejection_sample`, if it `is_on`.
        idx_mapping: ``[num_reqs]`` integer, the request indices of the step.
        rows: ``[num_logits]`` integer, the request index of each row verified last: a large batch comes in parts.
        logprob_token_ids: further arguments of `compute_topk_scores`; empty if no request has ``logprob_token_ids``.
    """

    def __init__(
        self,
        num_drafts: torch.Tensor,
        survival: torch.Tensor,
        requests: RequestSlots,
        faults: Faults,
        totals: torch.Tensor,
    ) -> None:
        self._num_drafts = num_drafts
        self._survival = survival
        self._totals = totals
        self._requests = requests
        self._faults = faults
        self.contained = faults.contained("verify", shared=True)
        self._all_greedy = False
        self.idx_mapping = np.empty(0, np.int32)
        self.rows: torch.Tensor | None = None
        self.logprob_token_ids: dict[str, Any] = {}

    @property
    def is_on(self) -> bool:
        """Whether it verifies: it has failed less than `MAX_FAULTS` times, and the device has the batch's policies."""
        return self._requests.is_current and not self._faults.is_off("verify")

    @contextlib.contextmanager
    def active(self, idx_mapping: np.ndarray, all_greedy: bool = False) -> Iterator[None]:
        """While it lasts, vLLM's V2 ``rejection_sample`` in this process calls this verifier.

        Args:
            idx_mapping: ``[num_reqs]`` integer, the request indices of the step.
            all_greedy: True only if every request of the step is known to be greedy.
        """
        self.idx_mapping = idx_mapping
        self._all_greedy = all_greedy
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compile what verifies logits of a kind: ``[num_rows, vocab_size]``."""
        of_row = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        self.rejection_sample(
            target_logits=logits,
            draft_sampled=of_row.int(),
            cu_num_logits=torch.arange(2, dtype=torch.int32, device=logits.device),
            pos=of_row,
            idx_mapping=of_row[:1],
            expanded_idx_mapping=of_row,
            expanded_local_pos=of_row.int(),
            temperature=self._requests.temperature,
            seed=torch.zeros_like(self._num_drafts, dtype=torch.int64),
            num_speculative_steps=self._survival.shape[1],
        )

    def without_fillers(
        self, draft_sampled: torch.Tensor, expanded_idx_mapping: torch.Tensor, expanded_local_pos: torch.Tensor
    ) -> torch.Tensor:
        """Replace fillers by -1 for vLLM's own sampler, so that it can't accept them.

        Args:
            draft_sampled: ``[num_logits]`` integer, the input token of each row.
            expanded_idx_mapping: ``[num_logits]`` integer, the request index of each row.
            expanded_local_pos: ``[num_logits]`` integer, each row's position in its request: 0 has the last
                emitted token, j the j-th draft column.
        """
        is_filler = expanded_local_pos > self._num_drafts[expanded_idx_mapping.long()]
        return draft_sampled.masked_fill(is_filler, PLACEHOLDER_TOKEN_ID)

    def rejection_sample(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's function of that name, for drafts without probabilities.

        Returns:
            Emitted tokens, ``[num_reqs, num_speculative_steps + 1]`` int64, -1 after them; and how many,
            ``[num_reqs]`` int32.
        """
        arguments["temperature"] = self._requests.temperature
        result = verify_seeded(
            SeededBatch(
                **arguments,
                num_drafts=self._num_drafts,
                policies=self._requests.policies,
                stop_token_ids=self._requests.stop_token_ids,
                survival=self._survival,
                totals=self._totals,
                all_greedy=self._all_greedy,
            )
        )
        return result.sampled, result.num_sampled


def install() -> list[patching.Replacement]:
    """Patch vLLM's sampler in this process; does nothing if that was done before.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace(
        {
            patching.V2_REJECTION_SAMPLE: patch_rejection_sample,
            patching.V2_GET_LOGPROBS: patch_get_logprobs_tensors,
            patching.V2_COMPUTE_LOGPROBS: patch_compute_topk_scores,
        }
    )


def patch_rejection_sample(stock: Callable) -> Callable:
    """Have vLLM's ``rejection_sample`` call the active verifier."""
    names = list(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def rejection_sample(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        verifier = _active.get()
        if verifier is None:
            return stock(*args, **kwargs)
        # `Signature.bind` takes as long as two launches.
        arguments = dict(zip(names, args, strict=False)) | kwargs
        verifier.rows = arguments["expanded_idx_mapping"]
        unsupported = _unsupported_argument(arguments)
        if unsupported is not None:
            _warn_once(unsupported)
        elif verifier.is_on:
            with verifier.contained:
                return verifier.rejection_sample(**{name: arguments[name] for name in _SUPPORTED})
        # If this fails: vLLM's sampler is strict, so it accepts a filler only if it is the target's own token.
        with verifier.contained:
            arguments["draft_sampled"] = verifier.without_fillers(
                arguments["draft_sampled"], arguments["expanded_idx_mapping"], arguments["expanded_local_pos"]
            )
        return stock(**arguments)

    return rejection_sample


def patch_get_logprobs_tensors(stock: Callable) -> Callable:
    """Have vLLM's rejection sampler report the log-probabilities of ``logprob_token_ids`` too."""

    @functools.wraps(stock)
    def _get_logprobs_tensors(self: RejectionSampler, *args: Any) -> LogprobsTensors | None:
        verifier = _active.get()
        if verifier is None:
            return stock(self, *args)
        state = self.sampler.logprob_token_ids_state
        most = state.max_num_token_ids(verifier.idx_mapping)
        if most == 0:
            return stock(self, *args)
        verifier.logprob_token_ids = {
            "logprob_token_ids_state": state,
            "expanded_idx_mapping": verifier.rows,
            "max_per_req_token_ids": most,
        }
        *others, max_num_logprobs = args
        try:
            return stock(self, *others, max(max_num_logprobs, 0))
        finally:
            verifier.logprob_token_ids = {}

    return _get_logprobs_tensors


def patch_compute_topk_scores(stock: Callable) -> Callable:
    """Pass it the ``logprob_token_ids`` that `patch_get_logprobs_tensors` has found."""

    @functools.wraps(stock)
    def compute_topk_scores(*args: Any, **kwargs: Any) -> LogprobsTensors:
        verifier = _active.get()
        return stock(*args, **kwargs, **({} if verifier is None else verifier.logprob_token_ids))

    return compute_topk_scores


def _unsupported_argument(arguments: dict[str, Any]) -> str | None:
    """The name of an argument that our verifier doesn't support; None if there is none."""
    for name, neutral in _UNSUPPORTED.items():
        value = arguments.get(name, neutral)
        # Tensors can't be compared with !=.
        if value is not None if neutral is None else value != neutral:
            return name
    return None


@functools.cache
def _warn_once(argument: str) -> None:
    logger.warning("aasd: vLLM's own rejection sampler verifies, strictly, because of %s", argument)
