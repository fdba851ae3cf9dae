"""The state of each request on the V1 model runner, by its id."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams

from vllm_aasd.config import Settings
from vllm_aasd.drafting.drafter import GREEDY, SAMPLED, SEEDED
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.namespaces import shared_namespace
from vllm_aasd.engine.request_options import (
    Verification,
    changes_with_drafts,
    settings_of,
    strict,
    verification_of,
)


class V1Request(NamedTuple):
    """What is known of one request. The same objects at every step, as `PolicyBatch` wants.

    Attributes:
        verification: how its draft tokens are verified.
        sampling: `GREEDY`, `SAMPLED` or `SEEDED`, as for `Drafter.admit`.
        namespace: of the earlier answers that it shares; None for none.
        corpora: the names of those that it draws from.
        drafter: what may draft for it: ``text``, ``model`` or ``both``.
    """

    verification: Verification
    sampling: str = GREEDY
    namespace: int | None = None
    corpora: tuple[str, ...] = ()
    drafter: str = "text"


class V1Requests:
    """The requests that a worker serves, from the first step that holds them until they end.

    Args:
        settings: the server's; a request's own options may change some of them for it.
        faults: of the worker.
        shares_text: whether our scheduler says which requests share text.
    """

    def __init__(self, settings: Settings, faults: Faults, shares_text: bool = False) -> None:
        self._settings = settings
        self._shares_text = shares_text
        self._faults = faults
        self._requests: dict[str, V1Request] = {}
        self._drafted: set[str] = set()
        self._without_text: set[str] = set()
        self._with_budget: set[str] = set()

    def __getitem__(self, req_id: str) -> V1Request:
        return self._requests[req_id]

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, req_ids: Iterable[str], requests: Mapping[str, Any]) -> list[str]:
        """Add the requests of a batch that are new.

        Args:
            req_ids: the batch.
            requests: the runner's state of each, by id.

        Returns:
            The new ones that get drafts.
        """
        drafted = []
        for req_id in req_ids:
            if req_id in self._requests:
                continue
            params = requests[req_id].sampling_params
            if params is not None and params.thinking_token_budget is not None:
                self._with_budget.add(req_id)
            if not self._faults.is_off("requests"):
                with self._faults.contained("requests", shared=True):
                    if self._admit(req_id, params):
                        drafted.append(req_id)
                    continue
            self._requests[req_id] = V1Request(strict())
        return drafted

    def _admit(self, req_id: str, params: SamplingParams | None) -> bool:
        settings = settings_of(params, self._settings)
        sampling = _sampling_of(params)
        namespace = shared_namespace(params, settings) if self._shares_text else None
        # The router's choice depends on time, and may not decide which random numbers a seed gives. Drafts beside a
        # grammar are made by the scheduler.
        by_model = params is not None and sampling != SEEDED and params.structured_outputs is None
        self._requests[req_id] = V1Request(
            verification_of(settings, params),
            sampling,
            namespace,
            settings.asked_corpora,
            settings.drafter if by_model else "text",
        )
        if not settings.enabled or changes_with_drafts(params):
            return False
        self._drafted.add(req_id)
        return True

    def is_drafted(self, req_id: str) -> bool:
        """Whether the request gets drafts."""
        return req_id in self._drafted

    def has_budget(self, req_id: str) -> bool:
        """Whether the request has a ``thinking_token_budget``."""
        return req_id in self._with_budget

    def has_text(self, req_id: str) -> bool:
        """Whether drafts from text haven't failed for the request."""
        return req_id not in self._without_text

    def stop_text(self, req_id: str) -> None:
        """Serve the request without drafts from text from here on."""
        self._without_text.add(req_id)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop the state of requests that have ended; unknown ones are ignored."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)
            self._drafted.discard(req_id)
            self._with_budget.discard(req_id)
            self._without_text.discard(req_id)


def _sampling_of(params: SamplingParams | None) -> str:
    if params is None or params.temperature == 0:
        return GREEDY
    return SAMPLED if params.seed is None else SEEDED
