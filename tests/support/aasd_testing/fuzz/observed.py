"""What was seen of one request."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Choice:
    """One answer of a request.

    Attributes:
        token_ids: emitted; None where the interface doesn't tell them.
        text: of it, without the prompt.
        finish_reason: vLLM's; None if we left before.
        stop_reason: the stop string or token that ended it; None for the end of the sequence.
        logprobs: of each token that the interface gives any for, the prompt's first where it is echoed: the chosen
            token's, and how many come with it; None where none were asked.
        prompt_logprobs: how many positions of the prompt have theirs; None where none were asked.
        tool_arguments: of each call of a tool.
    """

    token_ids: list[int] | None = None
    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    logprobs: list[tuple[float | None, int]] | None = None
    prompt_logprobs: int | None = None
    tool_arguments: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Observation:
    """What became of one request.

    Attributes:
        status: HTTP's, or 200 and 400 for a process that took or refused it; None if nothing came.
        error: what it said instead of an answer.
        choices: the answers.
        num_prompt_tokens: as told; None where it isn't.
        num_answer_tokens: of all choices, as told; None where it isn't.
        left: whether we went away in the midst of it, as the case has it.
        disturbed: whether an event meanwhile may have ended it, or refused it.
        seconds: to the first token and to the end.
        longest_gap: seconds between two pieces of a stream.
    """

    status: int | None = None
    error: str = ""
    choices: list[Choice] = dataclasses.field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    left: bool = False
    disturbed: set[str] = dataclasses.field(default_factory=set)
    seconds: tuple[float, float] = (0.0, 0.0)
    longest_gap: float = 0.0
