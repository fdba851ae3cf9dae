"""What a worker calls on the adapter of its model runner."""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds

from vllm_aasd.counters import Counters
from vllm_aasd.engine.corpora import ServerCorpora
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.kernels.draft import Prior


class Adapter(Protocol):
    """Connects vLLM's model runner with drafting and verification, once the KV cache exists.

    In each step the worker calls `begin_step` before the forward pass, runs vLLM's sampling within `sampling`, and
    passes the drafts that vLLM would schedule through `trimmed`.

    Attributes:
        faults: of this worker.
        counters: of this worker.
        prior: of the target, empty where none was made; None where it is off or can't be used.
        corpora: that it drafts from.
    """

    faults: Faults
    counters: Counters
    prior: Prior | None
    corpora: ServerCorpora

    def profile(self) -> None:
        """Measure what steps cost, after the model is warmed up."""

    def take_logits(self) -> tuple[list[str], torch.Tensor]:
        """End a step instead of sampling: its requests, and their logits, ``[num_requests, vocab_size]``."""

    def use_prior(self) -> None:
        """Draft from what `prior` holds now."""

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Prepare for a step, and drop the state of requests that have ended."""

    def sampling(self) -> AbstractContextManager[None]:
        """While it lasts, vLLM samples with our verifier."""

    def trimmed(self, drafts: DraftTokenIds) -> DraftTokenIds:
        """The drafts without tokens that we didn't draft."""

    def corpora_changed(self) -> None:
        """Draft from the corpora that there are now."""

    def clear_memory(self) -> None:
        """Forget what other requests taught."""

    def shutdown(self) -> None:
        """Release vLLM's objects."""
