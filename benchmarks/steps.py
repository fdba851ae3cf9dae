"""Counts per request: decode steps, tokens, drafts; and the acceptance figures of many requests.

*Mean acceptance length* (MAL) is the number of tokens emitted per decode step of a request. A request's first
token comes from its prefill, so neither the token nor that step counts. A step without drafts counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_aasd.tuning.statistics import stratified_ratio


class Counts(NamedTuple):
    """What one request did.

    Attributes:
        decode_steps: engine steps that emitted tokens of it, after the one of its prefill.
        decode_tokens: tokens emitted in those.
        draft_tokens: tokens drafted for it and verified.
        accepted_tokens: those of them that were accepted, as vLLM counts: also those accepted behind a token
            that ended the request, which aren't emitted.
    """

    decode_steps: int
    decode_tokens: int
    draft_tokens: int
    accepted_tokens: int


def acceptance(counts: Sequence[Counts], groups: Sequence[str]) -> dict[str, Any]:
    """The acceptance figures of requests, each figure the mean over their groups.

    Returns:
        ``mal`` (pooled: tokens by steps in each group) and ``mal_per_question`` (the mean of each question's
        MAL, those without a decode step left out), both with intervals; ``drafted_per_step``,
        ``accepted_per_step``, ``acceptance_rate`` (accepted by drafted; None without drafts) and
        ``num_questions``.
    """
    steps, tokens, drafted, accepted = (np.array(column, float) for column in zip(*counts, strict=True))
    decoding = [index for index in range(len(counts)) if steps[index] > 0]
    own = tokens[decoding] / steps[decoding]
    own_groups = [groups[index] for index in decoding]
    rate = stratified_ratio(accepted, drafted, groups)["value"] if drafted.any() else None
    return {
        "mal": stratified_ratio(tokens, steps, groups),
        "mal_per_question": stratified_ratio(own, np.ones(len(own)), own_groups),
        "drafted_per_step": stratified_ratio(drafted, steps, groups)["value"],
        "accepted_per_step": stratified_ratio(accepted, steps, groups)["value"],
        "acceptance_rate": rate,
        "num_questions": len(counts),
    }
