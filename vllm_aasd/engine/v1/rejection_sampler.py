"""Our verifier in the place of the V1 model runner's ``rejection_sample``.

vLLM's `RejectionSampler` does the rest as always: penalties, bad words, allowed ids, temperature, top-k and top-p
before us, log-probabilities of the accepted tokens after us. Where none of these is asked for, or where a step has no
drafts, it is bypassed, since it copies all logits three times before it comes to us (see `_sparing_copies`). Two faults of
its CPU build, which break every sampled request that speculates, and its loss of the log-probabilities of chosen tokens are
mended here too (see `install`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler as stock_sampler
from vllm.v1.sample.logits_processor import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_aasd.engine import patching
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1 import chosen_logprobs
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.engine.v1.thinking import UndraftedBudgets
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.kernels.verify.recovered import sample_recovered_tokens, sample_recovered_tokens_by_uniform
from vllm_aasd.verification.batch import PolicyBatch

_active: ContextVar["V1Verifier | None"] = ContextVar("aasd_v1_verifier", default=None)


class V1Verifier:
    """Verifies one worker's batches by the policy of each request.

    Args:
        requests: policy and stop tokens of each request; kept up to date by the owner.
        max_num_reqs: the most requests of a batch.
        device: where the logits are.
        faults: of the worker.
        counting: told of each step.

    Attributes:
        contained: around `rejection_sample`, if it `is_on`.
        has_failed: in this step.
    """

    def __init__(
        self,
        requests: V1Requests,
        max_num_reqs: int,
        device: torch.device,
        faults: Faults,
        counting: V1Counting,
    ) -> None:
        self._counting = counting
        self._requests = requests
        self._faults = faults
        self.contained = faults.contained("verify", shared=True)
        self._policies = PolicyBatch(max_num_reqs, device)
        self._req_ids: list[str] = []
        self.has_failed = False

    def begin_step(self, req_ids: list[str]) -> None:
        """Take in which requests the batch holds, in the order of its rows."""
        self._req_ids = req_ids
        self.has_failed = False

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended; unknown ones are passed over."""
        self._policies.forget(req_ids)

    @property
    def is_on(self) -> bool:
        """Whether it verifies still, having failed less than too often."""
        return not self._faults.is_off("verify")

    @property
    def all_strict(self) -> bool:
        """Whether no policy of the batch watches its tokens."""
        return all(self._requests[req_id].is_strict for req_id in self._req_ids)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, vLLM's ``rejection_sample`` in this process is this verifier's."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def rejection_sample(
        self,
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        target_logits: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """As vLLM's function of that name, for drafts without probabilities.

        A seeded request's random numbers are drawn as vLLM draws them, so that it gets the tokens that vLLM's own
        sampler would give it under strict verification.

        Returns:
            ``[batch_size, max_spec_len + 1]`` int32, -1 behind what is emitted.
        """
        batch_size = len(num_draft_tokens)
        if sampling_metadata.all_greedy:
            is_greedy = torch.ones(batch_size, dtype=torch.bool)
            uniform_probs = None
        else:
            is_greedy = sampling_metadata.temperature[:batch_size] == stock_sampler.GREEDY_TEMPERATURE
            uniform_probs = stock_sampler.generate_uniform_probs(
                len(draft_token_ids), num_draft_tokens, sampling_metadata.generators, target_logits.device
            )
        requests = [self._requests[req_id] for req_id in self._req_ids]
        policies, stop_token_ids = self._policies.fill(
            self._req_ids,
            [request.policy for request in requests],
            [request.stop_token_ids for request in requests],
            is_greedy,
        )
        result = verify_op.verify(
            draft_token_ids,
            cu_num_draft_tokens,
            max_spec_len,
            target_logits,
            bonus_token_ids,
            is_greedy,
            uniform_probs,
            policies,
            stop_token_ids,
        )
        if uniform_probs is not None:
            self._sample_recovered_tokens(
                result,
                draft_token_ids,
                num_draft_tokens,
                cu_num_draft_tokens,
                target_logits,
                is_greedy,
                sampling_metadata,
            )
        self._counting.verified(self._req_ids, draft_token_ids, cu_num_draft_tokens, result)
        return result.output_token_ids

    def count_vllms(
        self, draft_token_ids: torch.Tensor, cu_num_draft_tokens: torch.Tensor, output_token_ids: torch.Tensor
    ) -> None:
        """Count a step that vLLM's own sampler has verified in the place of `rejection_sample`."""
        self._counting.verified(self._req_ids, draft_token_ids, cu_num_draft_tokens, output_token_ids)

    def _sample_recovered_tokens(
        self,
        result: verify_op.VerifyOutput,
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        cu_num_draft_tokens: torch.Tensor,
        target_logits: torch.Tensor,
        is_greedy: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> None:
        """Draw the token at the first rejection of each sampled request, in place.

        With a seed as vLLM draws it, from its generator; without, by one uniform number.
        """
        num_drafts = torch.tensor(num_draft_tokens)
        seeded: dict[int, torch.Tensor] = {}
        for request, generator in sampling_metadata.generators.items():
            # vLLM draws for a seeded request with drafts even where nothing is rejected; its stream depends on it.
            if num_draft_tokens[request] > 0:
                noise = torch.empty(target_logits.shape[1], device=target_logits.device)
                seeded[request] = noise.exponential_(generator=generator).reciprocal_()
        rejected = (~is_greedy & (result.num_accepted < num_drafts)).nonzero().squeeze(1).tolist()
        first_rows = cu_num_draft_tokens - num_drafts

        def place(requests: list[int], draw: Callable[..., torch.Tensor], numbers: torch.Tensor) -> None:
            num_accepted = result.num_accepted[requests].long()
            rows = first_rows[requests].long() + num_accepted
            result.output_token_ids[requests, num_accepted] = draw(target_logits, rows, draft_token_ids[rows], numbers)

        if with_seed := [request for request in rejected if request in seeded]:
            place(with_seed, sample_recovered_tokens, torch.stack([seeded[request] for request in with_seed]))
        if without := [request for request in rejected if request not in seeded]:
            uniform = torch.rand(len(without), dtype=torch.float64, device=target_logits.device)
            place(without, sample_recovered_tokens_by_uniform, uniform)


def install() -> list[patching.Replacement]:
    """Put the verifier in its place in this process; does nothing where it is already.

    Also mends two faults of vLLM's CPU build, by which sampling with speculation divides by uninitialised
    memory (``expand_batch_to_tokens`` leaves its result unwritten) and dies of top-k on a step without drafts.

    Returns:
        What was replaced, to be undone.

    Raises:
        SeamError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace(
        {
            patching.REJECTION_SAMPLE: _dispatching,
            patching.REJECTION_SAMPLER_FORWARD: _sparing_copies,
            patching.EXPAND_BATCH_TO_TOKENS: lambda stock: functools.wraps(stock)(_expand_batch_to_tokens),
            patching.APPLY_SAMPLING_CONSTRAINTS: _sparing_empty_steps,
            patching.GATHER_CHOSEN_LOGPROBS: chosen_logprobs.leaving_rows,
        }
    )


def _dispatching(stock: Callable) -> Callable:
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
        verifier = _active.get()
        if verifier is not None and verifier.is_on and not verifier.has_failed:
            with verifier.contained, _rewinding(sampling_metadata.generators):
                return verifier.rejection_sample(
                    draft_token_ids,
                    num_draft_tokens,
                    max_spec_len,
                    cu_num_draft_tokens,
                    target_logits,
                    bonus_token_ids,
                    sampling_metadata,
                )
        # Ours has failed; or it is another engine of this process, or vLLM's profiling run.
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
            verifier.count_vllms(draft_token_ids, cu_num_draft_tokens, output_token_ids)
        return output_token_ids

    return rejection_sample


def _sparing_copies(stock: Callable) -> Callable:
    """Verify the lm_head's own rows where vLLM would copy them, as float32, for what nobody has asked for.

    With one request and five drafts these copies take 1.6% of a step on a CPU. Without drafts, a step of 32 requests loses 2%
    to them; it is sampled as without speculation, unless a relaxed policy watches all tokens. Its rows are bonus rows then.
    """

    @functools.wraps(stock)
    def forward(
        self: stock_sampler.RejectionSampler,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        verifier = _active.get()
        if verifier is None:
            return stock(self, metadata, draft_probs, logits, sampling_metadata)
        thinking = sampling_metadata.thinking_budget_state_holder
        if thinking is not None and thinking.has_tracked_requests():
            sampling_metadata = replace(sampling_metadata, thinking_budget_state_holder=UndraftedBudgets(thinking))
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
    """Whether vLLM's own sampler would take the argmax of the logits as they are, and keep nothing of them."""
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
def _rewinding(generators: Mapping[int, torch.Generator]) -> Iterator[None]:
    """If the block fails, put the requests' generators back: vLLM's sampler then draws what it would have drawn."""
    states = {generator: generator.get_state() for generator in generators.values()}
    try:
        yield
    except Exception:
        for generator, state in states.items():
            generator.set_state(state)
        raise


def _expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.tensor(replace_to, dtype=x.dtype, device=x.device), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def _sparing_empty_steps(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def apply_sampling_constraints(
        logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> torch.Tensor:
        if logits.shape[0] == 0:
            return logits
        return stock(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints
