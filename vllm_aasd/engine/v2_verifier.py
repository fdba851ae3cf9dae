"""Our verifier in the place of the V2 model runner's ``rejection_sample``.

vLLM's `RejectionSampler` does the rest as always: it gathers the drafts, marks those that a grammar forbids, applies
penalties, bad words, temperature, top-k and top-p before us, and reports log-probabilities after us.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from vllm_aasd.engine import seams
from vllm_aasd.engine.v2_counting import V2Counting
from vllm_aasd.engine.v2_requests import RequestSlots
from vllm_aasd.kernels.verify_seeded import PLACEHOLDER_TOKEN_ID, verify_seeded

logger = logging.getLogger("vllm.aasd")

_active: ContextVar["V2Verifier | None"] = ContextVar("aasd_v2_verifier", default=None)

# By the keyword of vLLM's function, the value at which stock vLLM does what we do. `contexts` belongs to watermarking.
_NOT_OURS = {
    "synthetic_conditional_rates": None,
    "use_fp64": False,
    "use_block_verification": False,
    "contexts": None,
    "watermarking": None,
    "watermarking_skip_mask": None,
    "watermark_key": None,
}


class V2Verifier:
    """Verifies one worker's batches on the device, by what is held for each request slot.

    Args:
        num_valid_drafts: ``[max_num_reqs]`` int32 by slot, kept up to date by the owner: how many of the slot's
            draft columns are drafts. The rest are fillers, which the runner needs to be valid token ids.
        requests: policies and stop tokens.
        counting: told of each step.
    """

    def __init__(self, num_valid_drafts: torch.Tensor, requests: RequestSlots, counting: V2Counting) -> None:
        self.counting = counting
        self._num_valid_drafts = num_valid_drafts
        self._requests = requests
        self._all_greedy = False

    @contextlib.contextmanager
    def active(self, all_greedy: bool = False) -> Iterator[None]:
        """While it lasts, vLLM's V2 ``rejection_sample`` in this process is this verifier's.

        Args:
            all_greedy: True only if every request of the step is known to be greedy.
        """
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
            Emitted tokens, ``[num_reqs, num_speculative_steps + 1]`` int64, -1 behind them; and how many,
            ``[num_reqs]`` int32.
        """
        with self.counting.verifier.measured():
            verified = verify_seeded(
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
        self.counting.verified(draft_sampled, cu_num_logits, idx_mapping, verified.num_sampled, verified)
        return verified.sampled, verified.num_sampled


def install() -> list[seams.Replacement]:
    """Put the verifier in its place in this process; does nothing where it is already.

    Returns:
        What was replaced, to be undone.

    Raises:
        SeamError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return seams.replace({seams.V2_REJECTION_SAMPLE: _dispatching})


def _dispatching(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def rejection_sample(
        target_logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        cu_num_logits: torch.Tensor,
        pos: torch.Tensor,
        idx_mapping: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        num_speculative_steps: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        verifier = _active.get()
        if verifier is not None:
            draft_sampled = verifier.without_fillers(draft_sampled, expanded_idx_mapping, expanded_local_pos)
            args = _without_first(args, kwargs)
            foreign = _foreign(draft_logits, args, kwargs)
            if foreign is None:
                return verifier.rejection_sample(
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
                )
            _say_once(foreign)
        emitted = stock(
            target_logits,
            draft_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            expanded_idx_mapping,
            expanded_local_pos,
            temperature,
            seed,
            num_speculative_steps,
            *args,
            **kwargs,
        )
        if verifier is not None:
            verifier.counting.verified(draft_sampled, cu_num_logits, idx_mapping, emitted[1])
        return emitted

    return rejection_sample


def _without_first(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Move the one further argument that vLLM hands over by its place to where its name is."""
    if args:
        kwargs["synthetic_conditional_rates"], *args = args
    return tuple(args)


def _foreign(draft_logits: torch.Tensor | None, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What of a call is beyond our verifier, by name; None if it is all ours."""
    if draft_logits is not None:
        return "draft_logits"
    if args:
        return "arguments that we don't know"
    for name, value in kwargs.items():
        if value is not _NOT_OURS.get(name, ...):
            return name
    return None


@functools.cache
def _say_once(foreign: str) -> None:
    logger.warning("aasd: vLLM's own rejection sampler verifies, strictly, because of %s", foreign)
