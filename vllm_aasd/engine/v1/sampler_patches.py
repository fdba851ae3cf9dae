"""Patches of vLLM's V1 sampler: our verifier, fewer copies, and workarounds for faults of vLLM.

vLLM's `RejectionSampler` still applies penalties, bad words, allowed ids, temperature, top-k and top-p before our
verifier, and computes the log-probabilities of the accepted tokens after it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler as stock_sampler
from vllm.v1.sample.logits_processor import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_aasd.engine import patching
from vllm_aasd.engine.v1 import chosen_logprobs, vllm_workarounds
from vllm_aasd.engine.v1.rejection_sampler import active_verifier
from vllm_aasd.engine.v1.thinking import UndraftedBudgets


def install() -> list[patching.Replacement]:
    """Patch vLLM's sampler in this process; does nothing if that was done before.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace(
        {
            patching.REJECTION_SAMPLE: patch_rejection_sample,
            patching.REJECTION_SAMPLER_FORWARD: patch_rejection_sampler_forward,
            patching.EXPAND_BATCH_TO_TOKENS: vllm_workarounds.patch_expand_batch_to_tokens,
            patching.APPLY_SAMPLING_CONSTRAINTS: vllm_workarounds.patch_apply_sampling_constraints,
            patching.GATHER_CHOSEN_LOGPROBS: chosen_logprobs.patch_gather_specific_token_logprobs,
            patching.PROMPT_TOKEN_IDS: vllm_workarounds.patch_prompt_token_ids,
        }
    )


def patch_rejection_sample(stock: Callable) -> Callable:
    """Have vLLM's ``rejection_sample`` call the active verifier."""

    @functools.wraps(stock)
    def rejection_sample(
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_logits: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        verifier = active_verifier()
        if verifier is not None and verifier.is_on and not verifier.has_failed:
            with verifier.contained, _restore_on_failure(sampling_metadata.generators):
                return verifier.rejection_sample(
                    draft_token_ids,
                    num_draft_tokens,
                    max_spec_len,
                    cu_num_draft_tokens,
                    target_logits,
                    bonus_token_ids,
                    sampling_metadata,
                )
        # Ours has failed, or none is active.
        output_token_ids = stock(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus_token_ids,
            sampling_metadata,
            *args,
            **kwargs,
        )
        if verifier is not None:
            verifier.count_stock(draft_token_ids, cu_num_draft_tokens, output_token_ids)
        return output_token_ids

    return rejection_sample


def patch_rejection_sampler_forward(stock: Callable) -> Callable:
    """Have vLLM's rejection sampler skip its float32 copies of the logits where no parameter needs them.

    With one request and five drafts these copies take 1.6% of a step on a CPU. Without drafts they take 2% of a step
    of 32 requests, which is then sampled as without speculation, unless a relaxed policy keeps state by its tokens.
    """

    @functools.wraps(stock)
    def forward(
        self: stock_sampler.RejectionSampler,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        verifier = active_verifier()
        if verifier is None:
            return stock(self, metadata, draft_probs, logits, sampling_metadata)
        thinking = sampling_metadata.thinking_budget_state_holder
        if thinking is not None and thinking.has_tracked_requests():
            undrafted = UndraftedBudgets(thinking, verifier.rows_with_budgets())
            sampling_metadata = replace(sampling_metadata, thinking_budget_state_holder=undrafted)
        asked = sampling_metadata.logprob_token_ids
        # Beside such a request, vLLM's plain sampler loses the most likely tokens that others have asked for.
        is_mixed = bool(asked) and sampling_metadata.max_num_logprobs is not None
        if not any(metadata.num_draft_tokens) and not is_mixed and verifier.all_strict:
            return self.sampler(logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True)
        if asked:
            with chosen_logprobs.set_aside() as rows:
                output = stock(self, metadata, draft_probs, logits, sampling_metadata)
            with verifier.contained:
                chosen_logprobs.put_in(output, self, rows, asked)
            return output
        if verifier.is_on and _is_argmax(sampling_metadata):
            with verifier.contained:
                output_token_ids = verifier.rejection_sample(
                    metadata.draft_token_ids,
                    metadata.num_draft_tokens,
                    metadata.max_spec_len,
                    metadata.cu_num_draft_tokens,
                    logits[metadata.target_logits_indices],
                    # In float32: torch finds a maximum several times sooner there.
                    logits[metadata.bonus_logits_indices].float().argmax(-1),
                    sampling_metadata,
                )
                return SamplerOutput(sampled_token_ids=output_token_ids, logprobs_tensors=None)
            verifier.has_failed = True
        return stock(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


def _is_argmax(sampling_metadata: SamplingMetadata) -> bool:
    """Whether vLLM's own sampler would take the argmax of the unchanged logits, and report nothing else."""
    thinking = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.all_greedy
        and sampling_metadata.no_penalties
        and sampling_metadata.max_num_logprobs is None
        and not sampling_metadata.logprob_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and not sampling_metadata.bad_words_token_ids
        and (thinking is None or not thinking.has_tracked_requests())
        and all(
            isinstance(processor, MinTokensLogitsProcessor) and not processor.min_toks
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        )
    )


@contextlib.contextmanager
def _restore_on_failure(generators: Mapping[int, torch.Generator]) -> Iterator[None]:
    """Restore the requests' generators if the block fails, so that vLLM's sampler draws what it would have drawn."""
    states = {generator: generator.get_state() for generator in generators.values()}
    try:
        yield
    except Exception:
        for generator, state in states.items():
            generator.set_state(state)
        raise
