"""What of speculation fails costs speculation, never an answer.

Each part of the work beside vLLM's own (a *place*) runs contained: an exception there is logged with its traceback the
first time, counted, and what follows the ``with`` block serves without that part. A place that has failed
`MAX_FAULTS` times is off until the process ends. What that costs:

| place | a fault | the place is off |
| --- | --- | --- |
| ``requests`` | the request is verified strictly, without drafts | every new request is |
| ``draft`` | V1: the request has no drafts from here on; V2: the batch has none in this step | no drafts |
| ``store`` | predictions of that step, or chunk of a prompt, aren't stored; where it isn't known whose blocks they lie in, all are forgotten | none are stored, drafts come without |
| ``step_time`` | V1: draft lengths by a fixed bar in this step; V2: by the number of requests | so from here on |
| ``verify`` | vLLM's own rejection sampler verifies this step, strictly | it verifies every step |
| ``metrics`` | a step isn't counted | no step is |

**With tensor parallelism** each rank runs the same step on its part of the model, and vLLM takes for granted that all
ranks come to the same tokens. A fault on every rank alike (a bug) may be contained as anywhere. One on a single
rank (out of memory) may not be, where the others go on to rely on its outcome: that the ranks' tokens would part
silently is worse than an engine that ends. No rank knows of the others' without asking at every step, so a *shared*
fault is logged, counted and raised where there are other ranks. On V1 that is verification, and by which policy: drafts
go through the scheduler, which takes the first rank's. On V2 each rank drafts for itself, so drafts and the store that
they read are shared too. Logits are collective: every rank must ask for them equally often, so a failing
``compute_logits`` is shared, and a rank whose store is off goes on to ask with the others.

**What can't be contained:** a lost device context (an illegal access poisons it, and vLLM's next call fails whatever we
catch), a crash of compiled code, and a kernel that fails after it was launched, which shows in whatever call waits for
the device next. Start-up isn't contained either: a server that can't set up its speculation says so and ends.
"""

import logging
from types import TracebackType

logger = logging.getLogger("vllm.aasd")

PLACES = ("requests", "draft", "store", "step_time", "verify", "metrics")

MAX_FAULTS = 8
"""Faults at one place after which it is off."""


class Faults:
    """The faults of one worker.

    Args:
        num_ranks: ranks that run each step together, of tensor parallelism.

    Attributes:
        counts: by place, how often it has failed; to be read by whoever reports it.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self.counts = dict.fromkeys(PLACES, 0)
        self.is_alone = num_ranks == 1
        self._contained = {place: _Contained(self, place, is_shared=False) for place in PLACES}
        self._shared = {place: _Contained(self, place, is_shared=not self.is_alone) for place in PLACES}

    def contained(self, place: str, shared: bool = False) -> "_Contained":
        """Swallow an exception of the ``with`` block, so that the code behind the block serves without it.

        Args:
            place: one of `PLACES`.
            shared: whether other ranks rely on this one's outcome; the exception goes on then, if there are others.
        """
        return (self._shared if shared else self._contained)[place]

    def is_off(self, place: str) -> bool:
        """Whether a place has failed too often to be tried again."""
        return self.counts[place] >= MAX_FAULTS

    def note(self, place: str, error: BaseException) -> None:
        """Count a fault, and tell of the first of its place and of the last."""
        self.counts[place] += 1
        count = self.counts[place]
        if count == 1:
            logger.error(
                "aasd: a fault in '%s'; requests are served without what it was to give, and only counts of more such "
                "are kept",
                place,
                exc_info=error,
            )
        if count == MAX_FAULTS:
            logger.error("aasd: '%s' has failed %d times and is off until a restart", place, count)


class _Contained:
    """A place's containment: made once, entered at every step."""

    __slots__ = ("_faults", "_is_shared", "_place")

    def __init__(self, faults: Faults, place: str, is_shared: bool) -> None:
        self._faults, self._place, self._is_shared = faults, place, is_shared

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        # Not KeyboardInterrupt and its like: those are meant for the process.
        if not isinstance(error, Exception):
            return False
        self._faults.note(self._place, error)
        return not self._is_shared
