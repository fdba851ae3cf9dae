"""Verification on the V1 model runner, for vLLM's ``rejection_sample``."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar

import torch
from vllm.v1.sample import rejection_sampler as stock_sampler
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.verification.table import PolicyBatch

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
            random = {}
        else:
            is_greedy = sampling_metadata.temperature[:batch_size] == stock_sampler.GREEDY_TEMPERATURE
            random = _random_numbers(num_draft_tokens, target_logits, sampling_metadata.generators)
        asked = [self._requests[req_id].verification for req_id in self._req_ids]
        policies, stop_token_ids = self._policies.fill(
            self._req_ids, [one.policy for one in asked], [one.stop_token_ids for one in asked]
        )
        result = verify_op.verify(
            verify_op.VerifyBatch(
                draft_token_ids,
                cu_num_draft_tokens,
                max_spec_len,
                target_logits,
                bonus_token_ids,
                is_greedy,
                policies,
                stop_token_ids,
                **random,
            )
        )
        self._counting.verified(self._req_ids, draft_token_ids, cu_num_draft_tokens, result)
        return result.sampled

    def count_stock(
        self, draft_token_ids: torch.Tensor, cu_num_draft_tokens: torch.Tensor, output_token_ids: torch.Tensor
    ) -> None:
        """Count a step that vLLM's own ``rejection_sample`` has verified."""
        self._counting.verified(self._req_ids, draft_token_ids, cu_num_draft_tokens, output_token_ids)


def _random_numbers(
    num_draft_tokens: list[int], target_logits: torch.Tensor, generators: Mapping[int, torch.Generator]
) -> dict[str, torch.Tensor]:
    """The random numbers of a `VerifyBatch`; those of seeded requests come from their generators, as in vLLM."""
    batch_size, device = len(num_draft_tokens), target_logits.device
    uniform_probs = stock_sampler.generate_uniform_probs(sum(num_draft_tokens), num_draft_tokens, generators, device)
    recovered_probs = torch.rand(batch_size, dtype=torch.float64, device=device)
    # vLLM draws for each seeded request with drafts, even if nothing is rejected, and its later numbers depend on it.
    seeded = [request for request in generators if num_draft_tokens[request] > 0]
    inv_q = torch.empty(len(seeded), target_logits.shape[1], device=device)
    for noise, request in zip(inv_q, seeded, strict=True):
        noise.exponential_(generator=generators[request]).reciprocal_()
    inv_q_rows = torch.full((batch_size,), -1, dtype=torch.int32, device=device)
    inv_q_rows[seeded] = torch.arange(len(seeded), dtype=torch.int32, device=device)
    return {
        "uniform_probs": uniform_probs,
        "recovered_probs": recovered_probs,
        "inv_q": inv_q,
        "inv_q_rows": inv_q_rows,
    }
