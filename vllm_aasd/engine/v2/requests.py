"""What the V2 model runner's kernels must know of each request, by its slot in the runner's state."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool
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

    What has changed is copied to the device's own memory in the order of its work: every program of the verifier looks
    at it, and a step that is still running goes on with the values that it was launched with.

    Args:
        settings: the server's; a request's own options may change some of them for it.
        req_ids: the runner's: the id of the request in each slot.
        max_seq_len: ``[max_num_reqs]`` int32, the runner's: by slot, tokens of prompt and longest output.
        model_config: has the number of tokens that the model takes, which vLLM may still lower to fit the memory.
        device: where the verifier runs.
        texts: told which text each request may draft from.
        faults: of the worker.

    Attributes:
        stop_token_ids: ``[max_num_reqs, MAX_STOP_TOKEN_IDS]`` int32 by slot, padded with -1.
        max_len: ``[max_num_reqs]`` int32 by slot, the tokens that a context may reach, 0 where nothing is drafted.
        temperature: ``[max_num_reqs]`` float32 by slot, as vLLM's own, which lies in the host's memory.
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
        columns = {**COLUMNS, "max_len": ((), torch.int32), "temperature": ((), torch.float32)}
        host = {name: torch.zeros(max_num_reqs, *shape, dtype=dtype) for name, (shape, dtype) in columns.items()}
        self._pools = {name: UvaBufferPool(tensor.shape, tensor.dtype) for name, tensor in host.items()}
        self._device = {name: torch.zeros_like(tensor, device=device) for name, tensor in host.items()}
        self._host = {name: tensor.numpy() for name, tensor in host.items()}
        self._table = PolicyTable({name: self._host[name] for name in COLUMNS}, device)
        self.stop_token_ids = self._device["stop_token_ids"]
        self.max_len = self._device["max_len"]
        self.temperature = self._device["temperature"]
        # The first slot that the device doesn't know yet, and the one after the last.
        self._changed = 0, max_num_reqs

    @property
    def policies(self) -> VerifyPolicies:
        """By slot; to be asked for at every step."""
        by_name = {name: self._device[name] for name in COLUMNS if name != "stop_token_ids"}
        return VerifyPolicies(**by_name, state=self._table.state)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note which request has entered a slot."""
        # What holds if the rest fails.
        self._table.clear(req_idx)
        self._host["max_len"][req_idx] = 0
        self._host["temperature"][req_idx] = sampling_params.temperature
        self._texts.enter(req_idx)
        first, end = self._changed
        self._changed = (min(first, req_idx), max(end, req_idx + 1)) if first < end else (req_idx, req_idx + 1)
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
        self._host["max_len"][req_idx] = longest if settings.enabled else 0
        if settings.enabled:
            namespace = shared_namespace(sampling_params, settings)
            self._texts.admit(req_idx, namespace, prediction_of(sampling_params), settings.asked_corpora)

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        self._table.forget(req_ids)

    @property
    def is_current(self) -> bool:
        """Whether the device sees what was taken in."""
        first, end = self._changed
        return first == end

    def apply_staged_writes(self) -> None:
        """Let the device see what was taken in since the last step."""
        with self._faults.contained("draft", shared=True):
            self._texts.apply_staged_writes()
        if self.is_current:
            return
        with self._faults.contained("requests", shared=True):
            first, end = self._changed
            for name, pool in self._pools.items():
                pool.copy_to_gpu(self._host[name][first:end], out=self._device[name][first:end])
            self._changed = 0, 0

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leave the logits as they are; other requests' processors may have had this list called."""
        return logits
