"""Our verifier in the place of the V2 model runner's ``rejection_sample``.

vLLM's `RejectionSampler` does the rest as always: it gathers the drafts, marks those that a grammar forbids, applies
penalties, bad words, temperature, top-k and top-p before us, and reports log-probabilities after us. Those of tokens
that a request has chosen (``logprob_token_ids``) it forgets where its plain sampler doesn't; here it is reminded.
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
from vllm_aasd.engine.v2.counting import V2Counting
from vllm_aasd.engine.v2.requests import RequestSlots
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID
from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

logger = logging.getLogger("vllm.aasd")

_active: ContextVar["V2Verifier | None"] = ContextVar("aasd_v2_verifier", default=None)

# By the parameter of vLLM's function, the value at which stock vLLM does what we do.
_NEUTRAL = {
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
_OURS = tuple(name for name in patching.V2_REJECTION_SAMPLE.parameters if name not in _NEUTRAL)


class V2Verifier:
    """Verifies one worker's batches on the device, by what is held for each request slot.

    Args:
        num_valid_drafts: ``[max_num_reqs]`` int32 by slot, kept up to date by the owner: how many of the slot's
            draft columns are drafts. The rest are fillers, which the runner needs to be valid token ids.
        requests: policies and stop tokens.
        faults: of the worker.
        counting: told of each step.

    Attributes:
        contained: around what it does, if it `is_on`.
        idx_mapping: ``[num_reqs]`` integer, the slots of the step's requests.
        rows: ``[num_logits]`` integer, the slot of each row that was verified last: a large batch comes in parts.
        chosen: what `compute_topk_scores` is told besides; empty where no request has chosen tokens.
    """

    def __init__(
        self, num_valid_drafts: torch.Tensor, requests: RequestSlots, faults: Faults, counting: V2Counting
    ) -> None:
        self._counting = counting
        self._num_valid_drafts = num_valid_drafts
        self._requests = requests
        self._faults = faults
        self.contained = faults.contained("verify", shared=True)
        self._all_greedy = False
        self.idx_mapping = np.empty(0, np.int32)
        self.rows: torch.Tensor | None = None
        self.chosen: dict[str, Any] = {}

    @property
    def is_on(self) -> bool:
        """Whether it can verify: it has failed less than too often, and the device knows the batch's policies."""
        return self._requests.is_current and not self._faults.is_off("verify")

    @contextlib.contextmanager
    def active(self, idx_mapping: np.ndarray, all_greedy: bool = False) -> Iterator[None]:
        """While it lasts, vLLM's V2 ``rejection_sample`` in this process is this verifier's.

        Args:
            idx_mapping: ``[num_reqs]`` integer, the slots of the step's requests.
            all_greedy: True only if every request of the step is known to be greedy.
        """
        self.idx_mapping = idx_mapping
        self._all_greedy = all_greedy
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def without_fillers(
        self, draft_sampled: torch.Tensor, expanded_idx_mapping: torch.Tensor, expanded_local_pos: torch.Tensor
    ) -> torch.Tensor:
        """Mark what was never drafted, so that no rule can accept it.

        Args:
            draft_sampled: ``[num_logits]`` integer, the input token of each row.
            expanded_idx_mapping: ``[num_logits]`` integer, the slot of each row's request.
            expanded_local_pos: ``[num_logits]`` integer, each row's place in its request: 0 holds the last
                emitted token, j the j-th draft column.

        Returns:
            ``[num_logits]``, -1 in the place of fillers.
        """
        is_filler = expanded_local_pos > self._num_valid_drafts[expanded_idx_mapping.long()]
        return draft_sampled.masked_fill(is_filler, PLACEHOLDER_TOKEN_ID)

    def rejection_sample(
        self,
        target_logits: torch.Tensor,
        draft_sampled: torch.Tensor,
        cu_num_logits: torch.Tensor,
        pos: torch.Tensor,
        idx_mapping: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        num_speculative_steps: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's function of that name, for drafts without probabilities; fillers must be marked already.

        Returns:
            Emitted tokens, ``[num_reqs, num_speculative_steps + 1]`` int64, -1 after them; and how many,
            ``[num_reqs]`` int32.
        """
        batch = SeededBatch(
            target_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            expanded_idx_mapping,
            expanded_local_pos,
            temperature,
            seed,
            num_speculative_steps,
            self._requests.policies,
            self._requests.stop_token_ids,
            all_greedy=self._all_greedy,
        )
        verified = verify_seeded(batch)
        self._counting.verified(draft_sampled, cu_num_logits, idx_mapping, verified.num_sampled, verified)
        return verified.sampled, verified.num_sampled

    def count_vllms(self, call: dict[str, Any], emitted: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count a step that vLLM's own sampler has verified in the place of `rejection_sample`.

        Args:
            call: its arguments, by name.
            emitted: its results.
        """
        self._counting.verified(call["draft_sampled"], call["cu_num_logits"], call["idx_mapping"], emitted[1])


def install() -> list[patching.Replacement]:
    """Put the verifier in its place in this process; does nothing where it is already.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace(
        {
            patching.V2_REJECTION_SAMPLE: _dispatching,
            patching.V2_GET_LOGPROBS: _asking_for_chosen,
            patching.V2_COMPUTE_LOGPROBS: _with_chosen,
        }
    )


def _dispatching(stock: Callable) -> Callable:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def rejection_sample(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        verifier = _active.get()
        if verifier is None:
            return stock(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        verifier.rows = call["expanded_idx_mapping"]
        # Should it fail: vLLM's sampler is strict, so a filler that it accepts is what the target says.
        with verifier.contained:
            call["draft_sampled"] = verifier.without_fillers(
                call["draft_sampled"], call["expanded_idx_mapping"], call["expanded_local_pos"]
            )
        foreign = _foreign(call)
        if foreign is not None:
            _say_once(foreign)
        elif verifier.is_on:
            with verifier.contained:
                return verifier.rejection_sample(**{name: call[name] for name in _OURS})
        emitted = stock(**call)
        verifier.count_vllms(call, emitted)
        return emitted

    return rejection_sample


def _asking_for_chosen(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def _get_logprobs_tensors(self: RejectionSampler, *args: Any) -> LogprobsTensors | None:
        verifier = _active.get()
        if verifier is None:
            return stock(self, *args)
        state = self.sampler.logprob_token_ids_state
        most = state.max_num_token_ids(verifier.idx_mapping)
        if most == 0:
            return stock(self, *args)
        verifier.chosen = {
            "logprob_token_ids_state": state,
            "expanded_idx_mapping": verifier.rows,
            "max_per_req_token_ids": most,
        }
        *others, max_num_logprobs = args
        try:
            return stock(self, *others, max(max_num_logprobs, 0))
        finally:
            verifier.chosen = {}

    return _get_logprobs_tensors


def _with_chosen(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def compute_topk_scores(*args: Any, **kwargs: Any) -> LogprobsTensors:
        verifier = _active.get()
        return stock(*args, **kwargs, **({} if verifier is None else verifier.chosen))

    return compute_topk_scores


def _foreign(call: dict[str, Any]) -> str | None:
    """What of a call is beyond our verifier, by name; None if it is all ours."""
    for name, neutral in _NEUTRAL.items():
        value = call.get(name, neutral)
        # A tensor has no plain equality.
        if value is not None if neutral is None else value != neutral:
            return name
    return None


@functools.cache
def _say_once(foreign: str) -> None:
    logger.warning("aasd: vLLM's own rejection sampler verifies, strictly, because of %s", foreign)
