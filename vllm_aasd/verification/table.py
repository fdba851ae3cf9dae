"""What the verify ops read of each request: the rows that a policy is written to."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from vllm_aasd.kernels.verify.policies import MAX_STOP_TOKEN_IDS, NUM_PARAMETERS, STRICT
from vllm_aasd.verification.rules import Policy
from vllm_aasd.verification.states import RequestStates

COLUMNS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "rule": ((), torch.int32),
    "parameters": ((NUM_PARAMETERS,), torch.float32),
    "state_rows": ((), torch.int32),
    "stop_token_ids": ((MAX_STOP_TOKEN_IDS,), torch.int32),
}
"""The table's columns: the shape of an entry and the dtype of each."""

_NO_TOKEN = -1
_NO_ROW = -1


class PolicyTable:
    """Writes requests' policies and stop tokens to rows that the model runner chooses.

    What is remembered of a request goes by its id (`RequestStates`), so that it survives a move to another row and a
    preemption; a row only says where it is. All rows are strict at first.

    Args:
        columns: memory to write to, ``[num_rows, *shape]`` for each of `COLUMNS`.
        device: where the op runs, and the remembered state is.

    Attributes:
        states: what is remembered.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], device: torch.device | str) -> None:
        self._columns = columns
        self.states = RequestStates(len(columns["rule"]), device)
        self.clear(slice(None))

    def clear(self, row: int | slice) -> None:
        """Make a row strict."""
        self._columns["rule"][row] = STRICT
        self._columns["state_rows"][row] = _NO_ROW
        self._columns["stop_token_ids"][row] = _NO_TOKEN

    def write(self, row: int, req_id: str, policy: Policy, stop_token_ids: Sequence[int]) -> None:
        """Write a request to a row, whatever stood there.

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
            self._columns["state_rows"][row] = self.states.row_of(req_id)
            self._columns["rule"][row] = policy.rule

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        self.states.forget(req_ids)
