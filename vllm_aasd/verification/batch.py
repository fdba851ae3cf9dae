"""From the requests' policies to the tensors that the verify op takes."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_aasd.kernels.verify.policies import MAX_STOP_TOKEN_IDS, NUM_PARAMETERS, STRICT, VerifyPolicies
from vllm_aasd.verification.rules import Policy
from vllm_aasd.verification.states import RequestStates

_NO_TOKEN = -1
_NO_ROW = -1


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
        self._states = RequestStates(max_num_reqs, device)
        self._requests: list[tuple[Policy, Sequence[int]] | None] = [None] * max_num_reqs
        self._rule_if_greedy, self._rule_if_sampled = np.full((2, max_num_reqs), STRICT, dtype=np.int32)
        self._parameters = np.zeros((max_num_reqs, NUM_PARAMETERS), dtype=np.float32)
        self._state_rows = np.full(max_num_reqs, _NO_ROW, dtype=np.int32)
        self._stop_token_ids = np.full((max_num_reqs, MAX_STOP_TOKEN_IDS), _NO_TOKEN, dtype=np.int32)

    def fill(
        self,
        req_ids: Sequence[str],
        policies: Sequence[Policy],
        stop_token_ids: Sequence[Sequence[int]],
        is_greedy: torch.Tensor,
    ) -> tuple[VerifyPolicies, torch.Tensor]:
        """Describe one step's batch.

        Args:
            req_ids: the id of each request, in the batch's order: what is remembered of a request goes by it.
            policies: the policy of each request, in the same order.
            stop_token_ids: the distinct ids that end each request, in the same order; empty where none does.
            is_greedy: [batch_size] bool.

        Returns:
            The op's `policies` and its `stop_token_ids` [batch_size, MAX_STOP_TOKEN_IDS] int32, padded with -1. On
            a CPU the tensors share this object's memory: they are valid until the next call.

        Raises:
            ValueError: more requests than `max_num_reqs`, the arguments' lengths differ, or a request has more
                than `MAX_STOP_TOKEN_IDS` stop tokens.
        """
        n = len(policies)
        if n > len(self._requests):
            raise ValueError(f"policies has {n} requests, must be at most {len(self._requests)}")
        if len(req_ids) != n or len(stop_token_ids) != n or is_greedy.shape != (n,):
            raise ValueError(
                f"req_ids has {len(req_ids)} requests, stop_token_ids {len(stop_token_ids)} and is_greedy has shape "
                f"{tuple(is_greedy.shape)}, expected {n} as in policies"
            )
        for i, request in enumerate(zip(policies, stop_token_ids, strict=True)):
            known = self._requests[i]
            if known is None or known[0] is not request[0] or known[1] is not request[1]:
                self._write(i, *request)
            is_strict = request[0].rule == STRICT
            self._state_rows[i] = _NO_ROW if is_strict else self._states.row_of(req_ids[i])
        greedy, sampled = self._tensor(self._rule_if_greedy, n), self._tensor(self._rule_if_sampled, n)
        return (
            VerifyPolicies(
                torch.where(is_greedy, greedy, sampled),
                self._tensor(self._parameters, n),
                self._tensor(self._state_rows, n),
                self._states.state,
            ),
            self._tensor(self._stop_token_ids, n),
        )

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        self._states.forget(req_ids)

    def _tensor(self, values: np.ndarray, n: int) -> torch.Tensor:
        return torch.from_numpy(values[:n]).to(self._device)

    def _write(self, i: int, policy: Policy, stop_token_ids: Sequence[int]) -> None:
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids[{i}] has {len(stop_token_ids)} ids, must be at most {MAX_STOP_TOKEN_IDS}")
        self._rule_if_greedy[i] = policy.rule if policy.relaxes(is_greedy=True) else STRICT
        self._rule_if_sampled[i] = policy.rule if policy.relaxes(is_greedy=False) else STRICT
        self._parameters[i] = policy.parameters
        self._stop_token_ids[i] = _NO_TOKEN
        self._stop_token_ids[i, : len(stop_token_ids)] = list(stop_token_ids)
        self._requests[i] = (policy, stop_token_ids)
