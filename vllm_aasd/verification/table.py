"""From the policies of requests to the tensors that the verify ops take."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from vllm_aasd.kernels.verify.policies import (
    MAX_STOP_TOKEN_IDS,
    NUM_PARAMETERS,
    NUM_STATES,
    STRICT,
    VerifyPolicies,
)
from vllm_aasd.verification.rules import Policy

COLUMNS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "rule": ((), torch.int32),
    "parameters": ((NUM_PARAMETERS,), torch.float32),
    "state_rows": ((), torch.int32),
    "stop_token_ids": ((MAX_STOP_TOKEN_IDS,), torch.int32),
}
"""The table's columns: the shape of an entry and the dtype of each."""

_NONE = -1


class PolicyTable:
    """Writes requests' policies and stop tokens to rows that the model runner chooses; all rows are strict at first.

    The state of a request goes by its id, from its first appearance to its end, so that a budget is not refilled when
    the request is preempted or moves to another row. The host only knows which row of the state is whose, and never
    reads one. A new owner's row is zeroed in the order of the device's work.

    Args:
        columns: memory to write to, ``[num_rows, *shape]`` for each of `COLUMNS`.
        device: where the op runs, and the state is.

    Attributes:
        state: ``[num_states, NUM_STATES]`` float32, of `VerifyPolicies`; doubled when all rows are taken, so to be read
            at every step.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], device: torch.device | str) -> None:
        self._columns = columns
        self.state = torch.zeros(len(columns["rule"]), NUM_STATES, dtype=torch.float32, device=device)
        self._state_rows: dict[str, int] = {}
        self._free = list(range(len(self.state)))
        self.clear(slice(None))

    def clear(self, row: int | slice) -> None:
        """Make a row strict."""
        self._columns["rule"][row] = STRICT
        self._columns["state_rows"][row] = _NONE
        self._columns["stop_token_ids"][row] = _NONE

    def write(self, row: int, req_id: str, policy: Policy, stop_token_ids: Sequence[int]) -> None:
        """Write a request to a row.

        Args:
            row: of the table.
            req_id: the request's id.
            policy: the request's, see `vllm_aasd.engine.request_options.verification_of`.
            stop_token_ids: the distinct ids that end it.

        Raises:
            ValueError: more than `MAX_STOP_TOKEN_IDS` stop tokens; the row is strict then.
        """
        self.clear(row)
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"stop_token_ids[{row}] has {len(stop_token_ids)} ids, must be at most {MAX_STOP_TOKEN_IDS}"
            )
        self._columns["stop_token_ids"][row, : len(stop_token_ids)] = stop_token_ids
        self._columns["parameters"][row] = policy.parameters
        if policy.rule != STRICT:
            self._columns["state_rows"][row] = self._state_row(req_id)
            self._columns["rule"][row] = policy.rule

    def _state_row(self, req_id: str) -> int:
        """The row of a request's state; one of zeros if it is new."""
        if req_id in self._state_rows:
            return self._state_rows[req_id]
        if not self._free:
            taken = len(self.state)
            self.state = torch.cat([self.state, torch.zeros_like(self.state)])
            self._free = list(range(taken, 2 * taken))
        row = self._state_rows[req_id] = self._free.pop()
        self.state[row].zero_()
        return row

    def forget(self, req_ids: Collection[str]) -> None:
        """Free the state of requests that have ended; ids without one are ignored."""
        self._free += [self._state_rows.pop(req_id) for req_id in req_ids if req_id in self._state_rows]


class PolicyBatch(PolicyTable):
    """The policies of a batch on the CPU, whose rows follow the batch's order.

    A row is written only if another request, policy or list of stop tokens was there in the step before, which is
    decided by object identity: pass the same objects for a request at every step, never modified.

    Args:
        max_num_reqs: the most requests of a batch.
    """

    def __init__(self, max_num_reqs: int) -> None:
        self._tensors = {
            name: torch.zeros(max_num_reqs, *shape, dtype=dtype) for name, (shape, dtype) in COLUMNS.items()
        }
        super().__init__({name: tensor.numpy() for name, tensor in self._tensors.items()}, "cpu")
        self._written: list[tuple[str, Policy, Sequence[int]] | None] = [None] * max_num_reqs

    def fill(
        self, req_ids: Sequence[str], policies: Sequence[Policy], stop_token_ids: Sequence[Sequence[int]]
    ) -> tuple[VerifyPolicies, torch.Tensor]:
        """Describe one step's batch.

        Args:
            req_ids: the id of each request, in the batch's order.
            policies: the policy of each request, in the same order.
            stop_token_ids: the distinct ids that end each request, in the same order.

        Returns:
            The op's `policies` and its `stop_token_ids` ``[batch_size, MAX_STOP_TOKEN_IDS]`` int32, padded with -1.
            They share this object's memory, so they are valid until the next call.

        Raises:
            ValueError: the arguments' lengths differ, or a request has more than `MAX_STOP_TOKEN_IDS` stop tokens.
        """
        for row, request in enumerate(zip(req_ids, policies, stop_token_ids, strict=True)):
            written = self._written[row]
            if written is None or any(one is not other for one, other in zip(written, request, strict=True)):
                self._written[row] = None
                self.write(row, *request)
                self._written[row] = request
        tensors = {name: tensor[: len(req_ids)] for name, tensor in self._tensors.items()}
        stops = tensors.pop("stop_token_ids")
        return VerifyPolicies(**tensors, state=self.state), stops

    def forget(self, req_ids: Collection[str]) -> None:
        """Free the state of requests that have ended."""
        super().forget(req_ids)
        if req_ids:
            # If an id comes again, it is another request.
            self._written = [None] * len(self._written)
