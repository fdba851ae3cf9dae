"""From the policies of a batch's requests to the tensors that the verify op takes."""

from collections.abc import Collection, Sequence

import torch

from vllm_aasd.kernels.verify.policies import VerifyPolicies
from vllm_aasd.verification.rules import Policy
from vllm_aasd.verification.table import COLUMNS, PolicyTable


class PolicyBatch:
    """The verification parameters of the requests of a batch, in tensors that live as long as the worker.

    A row is rewritten only when another request, policy or list of stop tokens stands there than in the step before,
    told by object identity: hand in the same objects for a request at every step, never altered.

    Args:
        max_num_reqs: the most requests of a batch, at least 1.

    Raises:
        ValueError: `max_num_reqs` is less than 1.
    """

    def __init__(self, max_num_reqs: int) -> None:
        if max_num_reqs < 1:
            raise ValueError(f"max_num_reqs is {max_num_reqs}, must be at least 1")
        self._tensors = {
            name: torch.zeros(max_num_reqs, *shape, dtype=dtype) for name, (shape, dtype) in COLUMNS.items()
        }
        self._table = PolicyTable({name: tensor.numpy() for name, tensor in self._tensors.items()}, "cpu")
        self._written: list[tuple[str, Policy, Sequence[int]] | None] = [None] * max_num_reqs

    def fill(
        self, req_ids: Sequence[str], policies: Sequence[Policy], stop_token_ids: Sequence[Sequence[int]]
    ) -> tuple[VerifyPolicies, torch.Tensor]:
        """Describe one step's batch.

        Args:
            req_ids: the id of each request, in the batch's order: what is remembered of a request goes by it.
            policies: the policy of each request, in the same order.
            stop_token_ids: the distinct ids that end each request, in the same order; empty where none does.

        Returns:
            The op's `policies` and its `stop_token_ids` [batch_size, MAX_STOP_TOKEN_IDS] int32, padded with -1. They
            share this object's memory: they are valid until the next call.

        Raises:
            ValueError: more requests than `max_num_reqs`, the arguments' lengths differ, or a request has more
                than `MAX_STOP_TOKEN_IDS` stop tokens.
        """
        n = len(policies)
        if n > len(self._written):
            raise ValueError(f"policies has {n} requests, must be at most {len(self._written)}")
        if len(req_ids) != n or len(stop_token_ids) != n:
            raise ValueError(
                f"req_ids has {len(req_ids)} requests and stop_token_ids {len(stop_token_ids)}, "
                f"expected {n} as in policies"
            )
        for row, request in enumerate(zip(req_ids, policies, stop_token_ids, strict=True)):
            written = self._written[row]
            if written is None or any(one is not other for one, other in zip(written, request, strict=True)):
                self._written[row] = None
                self._table.write(row, *request)
                self._written[row] = request
        tensors = {name: tensor[:n] for name, tensor in self._tensors.items()}
        stops = tensors.pop("stop_token_ids")
        return VerifyPolicies(**tensors, state=self._table.states.state), stops

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        if req_ids:
            self._table.forget(req_ids)
            # Should an id come again, it is another request.
            self._written = [None] * len(self._written)
