"""What the V2 model runner's kernels must know of each request, by its slot in the runner's state."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from vllm_aasd.config import Settings
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.namespaces import prediction_of, shared_namespace
from vllm_aasd.engine.request_options import settings_of, verification_of
from vllm_aasd.engine.v2.texts import V2Texts
from vllm_aasd.kernels.verify.policies import VerifyPolicies
from vllm_aasd.verification.table import COLUMNS, PolicyTable


class RequestSlots(LogitsProcessor):
    """Policy, stop tokens and longest length of each request, where the device can read them.

    It stands in the list of vLLM's sampler, which tells its entries of each request that enters a slot and, before
    the forward pass, that host writes are due. Logits are none of its business: it declines every request.
    `UvaBackedTensor` is what vLLM keeps its own sampling parameters in: a step that is still running goes on
    reading the values that it was launched with while the host prepares the next.

    Args:
        settings: the server's; a request's own options may change some of them for it.
        req_ids: the runner's: the id of the request in each slot.
        max_seq_len: ``[max_num_reqs]`` int32, the runner's: by slot, tokens of prompt and longest output.
        model_config: has the number of tokens that the model takes, which vLLM may still lower to fit the memory.
        device: where the verifier runs.
        texts: told which text each request may draft from.
        faults: of the worker.
    """

    def __init__(
        self,
        settings: Settings,
        req_ids: Mapping[int, str],
        max_seq_len: np.ndarray,
        model_config: ModelConfig,
        device: torch.device,
        texts: V2Texts,
        faults: Faults,
    ) -> None:
        self._settings = settings
        self._texts = texts
        self._req_ids = req_ids
        self._faults = faults
        self._max_seq_len = max_seq_len
        self._model_config = model_config
        max_num_reqs = len(max_seq_len)
        self._columns = {
            name: UvaBackedTensor((max_num_reqs, *shape), dtype=dtype) for name, (shape, dtype) in COLUMNS.items()
        }
        self._table = PolicyTable({name: column.np for name, column in self._columns.items()}, device)
        self._max_len = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self._changed = True

    @property
    def policies(self) -> VerifyPolicies:
        """By slot; to be asked for at every step."""
        by_name = {name: column.gpu for name, column in self._columns.items() if name != "stop_token_ids"}
        return VerifyPolicies(**by_name, state=self._table.state)

    @property
    def stop_token_ids(self) -> torch.Tensor:
        """``[max_num_reqs, MAX_STOP_TOKEN_IDS]`` int32 by slot, padded with -1; to be asked for at every step."""
        return self._columns["stop_token_ids"].gpu

    @property
    def max_len(self) -> torch.Tensor:
        """``[max_num_reqs]`` int32 by slot, the tokens that a context may reach, 0 where nothing is drafted; to be
        asked for at every step."""
        return self._max_len.gpu

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note which request has entered a slot."""
        # What holds if the rest fails.
        self._table.clear(req_idx)
        self._max_len.np[req_idx] = 0
        self._texts.enter(req_idx)
        self._changed = True
        if not self._faults.is_off("requests"):
            with self._faults.contained("requests", shared=True):
                self._admit(req_idx, sampling_params)
        return False

    def _admit(self, req_idx: int, sampling_params: SamplingParams) -> None:
        settings = settings_of(sampling_params, self._settings)
        req_id = self._req_ids.get(req_idx)
        # None: vLLM's profiling run. It stays strict.
        if req_id is not None:
            self._table.write(req_idx, req_id, *verification_of(settings, sampling_params))
        longest = min(self._max_seq_len[req_idx], self._model_config.max_model_len)
        self._max_len.np[req_idx] = longest if settings.enabled else 0
        if settings.enabled:
            namespace = shared_namespace(sampling_params, settings)
            self._texts.admit(req_idx, namespace, prediction_of(sampling_params), settings.asked_corpora)

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        self._table.forget(req_ids)

    @property
    def is_current(self) -> bool:
        """Whether the device sees what was taken in."""
        return not self._changed

    def apply_staged_writes(self) -> None:
        """Let the device see what was taken in since the last step."""
        with self._faults.contained("draft", shared=True):
            self._texts.apply_staged_writes()
        if not self._changed:
            return
        with self._faults.contained("requests", shared=True):
            for tensor in (*self._columns.values(), self._max_len):
                tensor.copy_to_uva()
            self._changed = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leave the logits as they are; other requests' processors may have had this list called."""
        return logits
