"""From the requests' policies to the tensors that the verify op takes."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_aasd.kernels.verify import VerifyPolicies
from vllm_aasd.verification.conditional import ConditionalVerification
from vllm_aasd.verification.strict import StrictVerification

Policy = StrictVerification | ConditionalVerification

_NO_TOKEN = -1


class PolicyBatch:
    """The verification parameters of the requests of a batch, in tensors that live as long as the worker.

    A row is rewritten only when another policy or another list of stop tokens stands there than in the step
    before, told by object identity: hand in the same objects for a request at every step, never altered.

    Args:
        max_num_reqs: the most requests of a batch, at least 1.
        device: where the op runs.

    Raises:
        ValueError: `max_num_reqs` is less than 1.
    """

    def __init__(self, max_num_reqs: int, device: torch.device | str) -> None:
        if max_num_reqs < 1:
            raise ValueError(f"max_num_reqs is {max_num_reqs}, must be at least 1")
        self._device = torch.device(device)
        self._requests: list[tuple[Policy, Sequence[int]] | None] = [None] * max_num_reqs
        self._relax_greedy = np.zeros(max_num_reqs, dtype=np.bool_)
        self._relax_sampled = np.zeros(max_num_reqs, dtype=np.bool_)
        self._alpha, self._beta, self._floor = np.ones((3, max_num_reqs), dtype=np.float32)
        self._stop_token_ids = np.full((max_num_reqs, 4), _NO_TOKEN, dtype=np.int32)

    def fill(
        self, policies: Sequence[Policy], stop_token_ids: Sequence[Sequence[int]], is_greedy: torch.Tensor
    ) -> tuple[VerifyPolicies, torch.Tensor]:
        """Describe one step's batch.

        Args:
            policies: the policy of each request, in the batch's order.
            stop_token_ids: the distinct ids that end each request, in the same order; empty where none does.
            is_greedy: [batch_size] bool.

        Returns:
            The op's `policies` and its `stop_token_ids` [batch_size, max_stop] int32, padded with -1. On a
            CPU the tensors share this object's memory: they are valid until the next call.

        Raises:
            ValueError: more requests than `max_num_reqs`, or the arguments' lengths differ.
        """
        n = len(policies)
        if n > len(self._requests):
            raise ValueError(f"policies has {n} requests, must be at most {len(self._requests)}")
        if len(stop_token_ids) != n or is_greedy.shape != (n,):
            raise ValueError(
                f"stop_token_ids has {len(stop_token_ids)} requests and is_greedy has shape "
                f"{tuple(is_greedy.shape)}, expected {n} as in policies"
            )
        for i, request in enumerate(zip(policies, stop_token_ids, strict=True)):
            known = self._requests[i]
            if known is None or known[0] is not request[0] or known[1] is not request[1]:
                self._write(i, *request)
        greedy, sampled = self._tensor(self._relax_greedy, n), self._tensor(self._relax_sampled, n)
        return (
            VerifyPolicies(
                torch.where(is_greedy, greedy, sampled),
                self._tensor(self._alpha, n),
                self._tensor(self._beta, n),
                self._tensor(self._floor, n),
            ),
            self._tensor(self._stop_token_ids, n),
        )

    def _tensor(self, values: np.ndarray, n: int) -> torch.Tensor:
        return torch.from_numpy(values[:n]).to(self._device)

    def _write(self, i: int, policy: Policy, stop_token_ids: Sequence[int]) -> None:
        self._relax_greedy[i] = policy.relaxes(is_greedy=True)
        self._relax_sampled[i] = policy.relaxes(is_greedy=False)
        if isinstance(policy, ConditionalVerification):
            self._alpha[i], self._beta[i], self._floor[i] = policy.alpha, policy.beta, policy.floor
        width = self._stop_token_ids.shape[1]
        if len(stop_token_ids) > width:
            wider = np.full((len(self._requests), 2 * len(stop_token_ids)), _NO_TOKEN, dtype=np.int32)
            wider[:, :width] = self._stop_token_ids
            self._stop_token_ids = wider
        self._stop_token_ids[i] = _NO_TOKEN
        self._stop_token_ids[i, : len(stop_token_ids)] = list(stop_token_ids)
        self._requests[i] = (policy, stop_token_ids)
