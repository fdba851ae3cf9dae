"""What our workers and our scheduler tell each other about drafts, beside what vLLM's do."""

import dataclasses

import numpy as np
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import DraftTokenIds

from vllm_aasd.counters import NUM_GRAMMAR_COUNTS


@dataclasses.dataclass
class InformedDraftTokenIds(DraftTokenIds):
    """A worker's drafts, and what its scheduler needs to make others of them.

    Attributes:
        whole: the drafts before they were cut to the lengths that are worth their time.
        survival: ``[num_reqs, longest]``, the probability that a whole draft is accepted up to each of its tokens.
        step_times: by the tokens in the batch, see `vllm_aasd.drafting.draft_length.lengths_and_gain`; None if draft
            lengths don't depend on them.
        overhead: see there.
    """

    whole: list[list[int]]
    survival: np.ndarray
    step_times: np.ndarray | None = None
    overhead: float = 1.0


@dataclasses.dataclass
class CountedGrammarOutput(GrammarOutput):
    """The scheduler's grammar masks, and what it has counted since the last ones.

    Attributes:
        counts: see `vllm_aasd.counters.Counters.add_grammar`.
        num_faults: of the scheduler, of the component ``grammar``.
    """

    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_GRAMMAR_COUNTS))
    num_faults: int = 0
