"""What is held for each request on the V1 model runner, by its id."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vllm_aasd.config import Settings
from vllm_aasd.engine.request_options import settings_of
from vllm_aasd.engine.start_up import policy_of
from vllm_aasd.verification.batch import Policy


class V1Request(NamedTuple):
    """How one request is verified. The same objects at every step, as `PolicyBatch` wants.

    Attributes:
        policy: by which its draft tokens are accepted.
        stop_token_ids: the distinct ids that end it.
    """

    policy: Policy
    stop_token_ids: list[int]


class V1Requests:
    """The requests that a worker serves, from the first step that holds them until they end.

    Args:
        settings: the server's; a request's own options may change some of them for it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server_policy = policy_of(settings)
        self._requests: dict[str, V1Request] = {}
        self._undrafted: set[str] = set()

    def __getitem__(self, req_id: str) -> V1Request:
        return self._requests[req_id]

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, req_ids: Iterable[str], requests: Mapping[str, Any]) -> None:
        """Take in the requests of a batch that are new.

        Args:
            req_ids: the batch.
            requests: the runner's state of each, by id.
        """
        for req_id in req_ids:
            if req_id not in self._requests:
                params = requests[req_id].sampling_params
                settings = settings_of(params, self._settings)
                if not settings.enabled:
                    self._undrafted.add(req_id)
                policy = self._server_policy if settings is self._settings else policy_of(settings)
                stop_token_ids = sorted(params.all_stop_token_ids) if params else []
                self._requests[req_id] = V1Request(policy, stop_token_ids)

    def is_drafted(self, req_id: str) -> bool:
        """Whether the request gets drafts."""
        return req_id not in self._undrafted

    def stop_drafting(self, req_id: str) -> None:
        """Serve the request without drafts from here on."""
        self._undrafted.add(req_id)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is held for requests that have ended; unknown ones are passed over."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)
            self._undrafted.discard(req_id)
