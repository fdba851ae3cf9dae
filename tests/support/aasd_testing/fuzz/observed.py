"""What was seen of one request, what the target says to it, and what is wrong with it."""

import dataclasses
from typing import Any, NamedTuple


@dataclasses.dataclass
class Choice:
    """One answer of a request, without what wasn't told or asked for.

    Attributes:
        logprobs: of each token that the interface gives any for, the prompt's first where it is echoed: the chosen
            token's, and by name those that come with it.
        prompt_logprobs: how many positions of the prompt have theirs.
        tool_arguments: of each call of a tool.
    """

    token_ids: list[int] | None = None
    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    logprobs: list[tuple[float | None, dict[str, float]]] | None = None
    prompt_logprobs: int | None = None
    tool_arguments: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Observation:
    """What became of one request.

    Attributes:
        status: HTTP's; None if nothing came.
        error: what it said instead of an answer.
        num_answer_tokens: of all choices.
        left: whether we went away in the midst of it, as the case has it.
        disturbed: what happened meanwhile that may have ended it, or had it refused.
    """

    status: int | None = None
    error: str = ""
    choices: list[Choice] = dataclasses.field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    left: bool = False
    disturbed: set[str] = dataclasses.field(default_factory=set)


class Finding(NamedTuple):
    """Something that isn't as it must be.

    Attributes:
        what: ``lost``, ``status``, ``count``, ``finish``, ``form``, ``logprobs`` or ``mismatch``; ``near_tie`` isn't a
            failure. Of the whole engine: ``leftover``, ``faults``, ``log``, ``wide``, ``leak``, ``dead``.
        step: the request's place in its case; None for the whole engine.
        detail: for people.
    """

    what: str
    step: int | None
    detail: str


class Reference(NamedTuple):
    """What the target says alone; `logprobs` are the likeliest tokens' by id, after penalties and their like."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[dict[int, float]]


def failures(findings: list[Finding]) -> list[Finding]:
    """Those that are: near ties aren't."""
    return [finding for finding in findings if finding.what != "near_tie"]
