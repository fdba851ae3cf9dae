"""Verification on the V1 model runner, for vLLM's ``rejection_sample``."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

import torch
from vllm.v1.sample import rejection_sampler as stock_sampler
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.kernels.verify.recovered import sample_recovered_tokens, sample_recovered_tokens_by_uniform
from vllm_aasd.verification.batch import PolicyBatch

_active: ContextVar["V1Verifier | None"] = ContextVar("aasd_v1_verifier", default=None)


def active_verifier() -> "V1Verifier | None":
    """The verifier of the engine that is sampling; None for another engine of this process, or vLLM's profiling run."""
    return _active.get()


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
        self._policies = PolicyBatch(max_num_reqs)
        self._req_ids: list[str] = []
        self.has_failed = False

    def begin_step(self, req_ids: list[str]) -> None:
        """Note which requests are in the batch, in the order of its rows."""
        self._req_ids = req_ids
        self.has_failed = False

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended; unknown ones are ignored."""
        self._policies.forget(req_ids)

    @property
    def is_on(self) -> bool:
        """Whether it verifies: it has failed less than `MAX_FAULTS` times."""
        return not self._faults.is_off("verify")

    @property
    def all_strict(self) -> bool:
        """Whether no policy of the batch watches its tokens."""
        return all(self._requests[req_id].verification.is_strict for req_id in self._req_ids)

    def rows_with_budgets(self) -> set[int]:
        """The batch rows of the requests that have a ``thinking_token_budget``."""
        return {row for row, req_id in enumerate(self._req_ids) if self._requests.has_budget(req_id)}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, vLLM's ``rejection_sample`` in this process calls this verifier."""
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
            ``[batch_size, max_spec_len + 1]`` int32, -1 after the emitted tokens.
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
        asked = [self._requests[req_id].verification for req_id in self._req_ids]
        policies, stop_token_ids = self._policies.fill(
            self._req_ids, [one.policy for one in asked], [one.stop_token_ids for one in asked]
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

    def count_stock(
        self, draft_token_ids: torch.Tensor, cu_num_draft_tokens: torch.Tensor, output_token_ids: torch.Tensor
    ) -> None:
        """Count a step that vLLM's own ``rejection_sample`` has verified."""
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
