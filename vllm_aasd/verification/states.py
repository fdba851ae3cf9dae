"""What the verifier remembers of each request, in one tensor where it runs."""

from collections.abc import Iterable

import torch

from vllm_aasd.kernels.verify.policies import NUM_STATES


class RequestStates:
    """The rows of `VerifyPolicies.state`, kept by request id from a request's first appearance to its end.

    A row stays a request's own when the request is preempted and when it moves to another place in the batch, so a
    budget is never refilled by either. The host only says whose a row is; it never reads one. A new owner's row is
    zeroed in the order of the device's work, behind the steps that were launched before and ahead of those to come.

    Args:
        num_rows: rows to begin with, at least 1; they double when all are taken.
        device: where the op runs.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.state = torch.zeros(num_rows, NUM_STATES, dtype=torch.float32, device=device)
        """[num_rows, NUM_STATES] float32; to be asked for at every step."""
        self._rows: dict[str, int] = {}
        self._free = list(range(num_rows))

    def row_of(self, req_id: str) -> int:
        """The row of a request; one of zeros if it is new."""
        if req_id in self._rows:
            return self._rows[req_id]
        if not self._free:
            taken = len(self.state)
            self.state = torch.cat([self.state, torch.zeros_like(self.state)])
            self._free = list(range(taken, 2 * taken))
        row = self._rows[req_id] = self._free.pop()
        self.state[row].zero_()
        return row

    def forget(self, req_ids: Iterable[str]) -> None:
        """Free the rows of requests that have ended; ids that have none are nothing to it."""
        for req_id in req_ids:
            row = self._rows.pop(req_id, None)
            if row is not None:
                self._free.append(row)
