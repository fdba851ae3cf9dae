"""What the V2 model runner's kernels must know of each request, by its slot in the runner's state."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_aasd.config import Settings
from vllm_aasd.engine.start_up import policy_of
from vllm_aasd.kernels.policies import NUM_PARAMETERS, STRICT, VerifyPolicies
from vllm_aasd.verification.states import RequestStates

_NO_TOKEN = -1
_NO_ROW = -1


class RequestSlots(LogitsProcessor):
    """Policy, stop tokens and longest length of each request, where the device can read them.

    It stands in the list of vLLM's sampler, which tells its entries of each request that enters a slot and, before
    the forward pass, that host writes are due. Logits are none of its business: it declines every request.
    `UvaBackedTensor` is what vLLM keeps its own sampling parameters in: a step that is still running goes on
    reading the values that it was launched with while the host prepares the next.

    What is remembered of a request (`RequestStates`) goes by its id, so that it survives preemption, which takes the
    slot away; a slot only says where it is.

    Args:
        settings: by which requests are verified.
        req_ids: the runner's: the id of the request in each slot.
        max_seq_len: ``[max_num_reqs]`` int32, the runner's: by slot, tokens of prompt and longest output.
        max_model_len: tokens that the model takes.
        device: where the verifier runs.
    """

    def __init__(
        self,
        settings: Settings,
        req_ids: Mapping[int, str],
        max_seq_len: np.ndarray,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._req_ids = req_ids
        self._max_seq_len = max_seq_len
        self._max_model_len = max_model_len
        max_num_reqs = len(max_seq_len)
        self._rule = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self._parameters = UvaBackedTensor((max_num_reqs, NUM_PARAMETERS), dtype=torch.float32)
        self._state_rows = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self._states = RequestStates(max_num_reqs, device)
        self._max_len = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self._stop_token_ids = self._wide(max_num_reqs, 4)
        self._retired: list[UvaBackedTensor] = []
        self._changed = True

    @staticmethod
    def _wide(max_num_reqs: int, width: int) -> UvaBackedTensor:
        tensor = UvaBackedTensor((max_num_reqs, width), dtype=torch.int32)
        tensor.np[:] = _NO_TOKEN
        return tensor

    @property
    def policies(self) -> VerifyPolicies:
        """By slot; to be asked for at every step."""
        return VerifyPolicies(self._rule.gpu, self._parameters.gpu, self._state_rows.gpu, self._states.state)

    @property
    def stop_token_ids(self) -> torch.Tensor:
        """``[max_num_reqs, max_stop]`` int32 by slot, padded with -1; to be asked for at every step."""
        return self._stop_token_ids.gpu

    @property
    def max_len(self) -> torch.Tensor:
        """``[max_num_reqs]`` int32 by slot, the tokens that a context may reach; to be asked for at every step."""
        return self._max_len.gpu

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take in who has entered a slot."""
        policy = policy_of(self._settings, sampling_params)
        relaxes = policy.relaxes(is_greedy=sampling_params.temperature == 0.0)
        self._rule.np[req_idx] = policy.rule if relaxes else STRICT
        self._parameters.np[req_idx] = policy.parameters()
        self._state_rows.np[req_idx] = self._states.row_of(self._req_ids[req_idx]) if relaxes else _NO_ROW
        self._max_len.np[req_idx] = min(self._max_seq_len[req_idx], self._max_model_len)
        stop_token_ids = sorted(sampling_params.all_stop_token_ids)
        width = self._stop_token_ids.np.shape[1]
        if len(stop_token_ids) > width:
            # Rare, and the only thing here that ever grows.
            wider = self._wide(len(self._max_seq_len), 2 * len(stop_token_ids))
            wider.np[:, :width] = self._stop_token_ids.np
            # A step that is still running may read it.
            self._retired.append(self._stop_token_ids)
            self._stop_token_ids = wider
        self._stop_token_ids.np[req_idx] = _NO_TOKEN
        self._stop_token_ids.np[req_idx, : len(stop_token_ids)] = stop_token_ids
        self._changed = True
        return False

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        self._states.forget(req_ids)

    def apply_staged_writes(self) -> None:
        """Let the device see what was taken in since the last step."""
        if not self._changed:
            return
        for tensor in (self._rule, self._parameters, self._state_rows, self._max_len, self._stop_token_ids):
            tensor.copy_to_uva()
        self._changed = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leave the logits as they are; other requests' processors may have had this list called."""
        return logits
