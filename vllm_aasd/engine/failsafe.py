"""A failure in our code disables speculation, never a request.

Each *component* runs in ``with faults.contained(component)`` blocks. Exceptions in them are counted, and the first is
logged with its traceback; the code after a block continues without the component's result. A component that has failed
`MAX_FAULTS` times is off until the process ends.

| component | after a failure | when off |
| --- | --- | --- |
| ``requests`` | the request is verified strictly, without drafts | every new request is |
| ``draft`` | V1: the request has no more drafts from text; V2: the batch has none in this step | no drafts |
| ``draft_model`` | the batch has drafts from text in this step | text alone drafts |
| ``grammar`` | the request's drafts are the worker's, which its grammar cuts | all requests' are |
| ``store`` | the step's predictions aren't stored, or all are forgotten if their owners are unknown | none are stored |
| ``step_time`` | V1: this step's draft lengths follow a fixed threshold; V2: the number of requests | every step's do |
| ``verify`` | vLLM's own rejection sampler verifies this step, strictly | it verifies every step |
| ``metrics`` | V1: the step isn't counted; V2: the figures aren't published | none is |

**With tensor parallelism** each rank runs the same step on its part of the model, and vLLM assumes that all ranks
sample the same tokens. If only one rank fails (out of memory) and continues without the component while others rely on
its result, the ranks' tokens diverge silently, which is worse than an engine that stops. Ranks can't learn of each
other's failures without communicating at every step, so a *shared* failure is logged, counted and raised where there
are other ranks. On V1, verification and the choice of the policy are shared; drafts aren't, because the scheduler
takes the first rank's. On V2 each rank drafts for itself, so drafts and the store that they read are shared too.
Logits are computed by all ranks together: each must ask for them equally often, so a failing ``compute_logits`` is
shared, and a rank whose store is off goes on asking.

**What can't be contained:** a lost device context (vLLM's next call fails whatever we catch), a crash of compiled code,
and a kernel that fails after its launch, which raises in whatever call waits for the device next. Start-up isn't
contained either: a server that can't set up its speculation says so and ends.
"""

import logging
from types import TracebackType

logger = logging.getLogger("vllm.aasd")

COMPONENTS = ("requests", "draft", "draft_model", "grammar", "store", "step_time", "verify", "metrics")

MAX_FAULTS = 8
"""Failures of a component after which it is off."""


class Faults:
    """The faults of one worker, or of a scheduler.

    Args:
        num_ranks: ranks that run each step together, of tensor parallelism.

    Attributes:
        counts: failures by component.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self.counts = dict.fromkeys(COMPONENTS, 0)
        self.is_alone = num_ranks == 1
        self._contained = {component: _Contained(self, component, is_shared=False) for component in COMPONENTS}
        self._shared = {component: _Contained(self, component, is_shared=not self.is_alone) for component in COMPONENTS}

    def contained(self, component: str, shared: bool = False) -> "_Contained":
        """Swallow an exception of the ``with`` block, so that the code after the block serves without it.

        Args:
            component: one of `COMPONENTS`.
            shared: whether other ranks rely on this one's result; if there are others, the exception is then raised.
        """
        return (self._shared if shared else self._contained)[component]

    def is_off(self, component: str) -> bool:
        """Whether a component has failed too often to be tried again."""
        return self.counts[component] >= MAX_FAULTS

    def clear(self) -> None:
        """Begin to serve: what failed before, which no request noticed, turns nothing off. It is logged."""
        failed = {component: count for component, count in self.counts.items() if count}
        if failed:
            logger.error("aasd: failures before the first request, by part: %s", failed)
        self.counts.update(dict.fromkeys(COMPONENTS, 0))

    def note(self, component: str, error: BaseException) -> None:
        """Count a failure of a component, and log the first and the last."""
        self.counts[component] += 1
        count = self.counts[component]
        if count == 1:
            logger.error(
                "aasd: '%s' failed; requests are served without it, and more failures are only counted",
                component,
                exc_info=error,
            )
        if count == MAX_FAULTS:
            logger.error("aasd: '%s' has failed %d times and is off until a restart", component, count)


class _Contained:
    """A component's containment: made once, entered at every step."""

    __slots__ = ("_component", "_faults", "_is_shared")

    def __init__(self, faults: Faults, component: str, is_shared: bool) -> None:
        self._faults, self._component, self._is_shared = faults, component, is_shared

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        # KeyboardInterrupt and the like are meant for the process.
        if not isinstance(error, Exception):
            return False
        self._faults.note(self._component, error)
        return not self._is_shared
