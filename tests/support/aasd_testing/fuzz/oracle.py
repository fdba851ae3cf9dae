"""What must come of a request, whatever else goes on: judged from the request, its answer and the target's own."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aasd_testing.fuzz import kinds
from aasd_testing.fuzz.cases import Step
from aasd_testing.fuzz.observed import Choice, Observation

NEAR_TIE = 1e-3
"""Nats between two tokens of which either may come: in float32 a batch of another shape moves logits by about 1e-5."""


class Finding(NamedTuple):
    """Something that isn't as it must be.

    Attributes:
        what: ``lost``, ``status``, ``count``, ``finish``, ``form``, ``logprobs`` or ``mismatch``; ``near_tie`` isn't a
            failure. Of the whole engine: ``leftover``, ``faults``, ``log``, ``dead``.
        step: the request's place in its case; None for the whole engine.
        detail: for people.
    """

    what: str
    step: int | None
    detail: str


class Reference(NamedTuple):
    """What the target says alone, without speculation.

    Attributes:
        token_ids: of the answer.
        text: of it.
        finish_reason: vLLM's.
        logprobs: at each position, the likeliest tokens' by id, after penalties and their like.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[dict[int, float]]


def judge(
    index: int,
    step: Step,
    seen: Observation,
    reference: Reference | None,
    prompt_tokens: int,
    max_model_len: int,
    token_of: Callable[[str], list[int]],
) -> list[Finding]:
    """Everything about one request that isn't as it must be.

    Args:
        index: of the step in its case.
        step: the request.
        seen: what became of it.
        reference: for a request that is compared.
        prompt_tokens: of its prompt; for ``chat`` and ``beam``, not judged.
        max_model_len: tokens that the engine takes.
        token_of: a text's ids, without a sequence's first.
    """
    found: list[Finding] = []

    def say(what: str, detail: str) -> None:
        found.append(Finding(what, index, f"{step['kind']}: {detail}"))

    if not _is_answered(step, seen, say):
        return found
    for choice in seen.choices:
        _judge_choice(step, choice, seen, prompt_tokens, max_model_len, token_of, say)
    if not seen.left and not is_aborted(step, seen):
        _judge_counts(step, seen, prompt_tokens, say)
    if reference is not None and seen.choices and seen.choices[0].token_ids is not None:
        _compare(step, seen.choices[0], seen, reference, say)
    return found


def _is_answered(step: Step, seen: Observation, say: Callable[[str, str], None]) -> bool:
    if seen.left and seen.status in (None, 200):
        return seen.status == 200
    if seen.status is None:
        say("lost", f"no answer: {seen.error[:300]}")
        return False
    if "refused" in step:
        if seen.status != 400 or step["refused"] not in seen.error:
            say("status", f"{seen.status} instead of a refusal with {step['refused']!r}: {seen.error[:300]}")
        return False
    if seen.status == 404 and step.get("adapter") and "adapter" in seen.disturbed:
        return False
    if seen.status == 500 and "abort" in seen.disturbed and step.get("echo"):
        # vLLM looks for the log-probabilities of a prompt that was never read.
        return False
    if seen.status != 200:
        say("status", f"{seen.status}: {seen.error[:300]}")
        return False
    return True


def is_aborted(step: Step, seen: Observation) -> bool:
    """Whether the engine ended a request early, as an event told it to; a choice without a token isn't in a stream."""
    if "abort" not in seen.disturbed:
        return False
    least = step["sampling"].get("n", 1) if step.get("via") == "stream" else 1
    return len(seen.choices) < least or any(choice.finish_reason in (None, "abort") for choice in seen.choices)


def _judge_counts(step: Step, seen: Observation, prompt_tokens: int, say: Callable[[str, str], None]) -> None:
    wanted = step["sampling"].get("n", 1)
    if len(seen.choices) != wanted:
        say("count", f"{len(seen.choices)} choices instead of {wanted}")
    known = [choice.token_ids for choice in seen.choices if choice.token_ids is not None]
    emitted = sum(map(len, known))
    if len(known) == len(seen.choices) and seen.num_answer_tokens not in (None, emitted):
        say("count", f"usage tells {seen.num_answer_tokens} tokens of {emitted}")
    if step.get("via") not in ("chat", "beam") and seen.num_prompt_tokens not in (None, prompt_tokens):
        say("count", f"usage tells {seen.num_prompt_tokens} prompt tokens of {prompt_tokens}")


def _judge_choice(
    step: Step,
    choice: Choice,
    seen: Observation,
    prompt_tokens: int,
    max_model_len: int,
    token_of: Callable[[str], list[int]],
    say: Callable[[str, str], None],
) -> None:
    sampling, ids = step["sampling"], choice.token_ids
    if choice.finish_reason is None:
        if not seen.left and not is_aborted(step, seen):
            say("lost", "the answer has no end")
    elif choice.finish_reason == "abort":
        if not seen.left and "abort" not in seen.disturbed:
            say("finish", "aborted, and nobody asked for it")
    elif choice.finish_reason not in ("stop", "length", "tool_calls"):
        say("finish", choice.finish_reason)
    if ids is not None:
        most = min(sampling["max_tokens"], max_model_len - prompt_tokens)
        if len(ids) > most or (choice.finish_reason == "length" and len(ids) != most):
            say("count", f"{len(ids)} tokens of {most}, ended by {choice.finish_reason}")
        if choice.finish_reason == "stop" and len(ids) < sampling.get("min_tokens", 0):
            say("count", f"{len(ids)} tokens, fewer than min_tokens")
        if sampling.get("ignore_eos") and choice.finish_reason == "stop":
            say("finish", "stopped in spite of ignore_eos")
        if "allowed_token_ids" in sampling and not set(ids) <= set(sampling["allowed_token_ids"]):
            say("form", "a token that isn't allowed")
        for word in sampling.get("bad_words", ()):
            banned = token_of(word)
            if any(ids[at : at + len(banned)] == banned for at in range(len(ids))):
                say("form", f"the bad word {word!r}")
        if choice.finish_reason == "stop":
            _judge_stop(sampling, choice, say)
    if choice.finish_reason != "abort":
        _judge_logprobs(step, choice, prompt_tokens, say)
    if choice.finish_reason in ("stop", "tool_calls"):
        _judge_structure(step, choice, say)


def _judge_stop(sampling: dict[str, Any], choice: Choice, say: Callable[[str, str], None]) -> None:
    if isinstance(choice.stop_reason, str) and choice.stop_reason not in sampling.get("stop", ()):
        say("finish", f"stopped by {choice.stop_reason!r}")
    kept = sampling.get("include_stop_str_in_output", False)
    for stop in sampling.get("stop", ()):
        at = choice.text.find(stop)
        if at >= 0 and not (kept and choice.text.endswith(stop) and at == len(choice.text) - len(stop)):
            say("finish", f"the stop string {stop!r} stands within the answer")


def _judge_logprobs(step: Step, choice: Choice, prompt_tokens: int, say: Callable[[str, str], None]) -> None:
    sampling = step["sampling"]
    if choice.prompt_logprobs is not None and choice.prompt_logprobs != prompt_tokens:
        say("logprobs", f"of {choice.prompt_logprobs} positions of a prompt of {prompt_tokens}")
    if choice.logprobs is None:
        if sampling.get("logprobs") is not None and choice.token_ids and step.get("via") != "beam":
            say("logprobs", "none, though they were asked for")
        return
    if choice.token_ids is not None:
        wanted = len(choice.token_ids) + (prompt_tokens if step.get("echo") else 0)
        if len(choice.logprobs) != wanted:
            say("logprobs", f"{len(choice.logprobs)} rows of {wanted} tokens")
    # An interface may leave out two tokens that read the same, so nothing is said of how many there are.
    first = 1 if step.get("echo") else 0
    if any(value is None or not value <= 1e-4 for value, _ in choice.logprobs[first:]):
        say("logprobs", "a value that is none")


def _judge_structure(step: Step, choice: Choice, say: Callable[[str, str], None]) -> None:
    constraint = step["sampling"].get("structured_outputs", {})
    forced = step.get("tool_choice") not in (None, "auto")
    texts = list(choice.tool_arguments)
    if forced and not texts:
        say("form", "no tool is called")
    if "json" in constraint:
        texts.append(choice.text)
    if "json" in constraint or forced:
        for text in texts:
            if not is_of_schema(text):
                say("form", f"not of the schema: {text[:200]!r}")
    if "regex" in constraint and not re.fullmatch(kinds.REGEX, choice.text):
        say("form", f"not of the regular expression: {choice.text[:200]!r}")
    if "choice" in constraint and choice.text not in kinds.CHOICES:
        say("form", f"none of the choices: {choice.text[:200]!r}")


def is_of_schema(text: str) -> bool:
    """Whether a text is an object of `kinds.SCHEMA`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(value, dict)
        and set(value) == {"kind", "n"}
        and value["kind"] in ("text", "code")
        and type(value["n"]) is int
        and 0 <= value["n"] <= 99
    )


def _compare(
    step: Step, choice: Choice, seen: Observation, reference: Reference, say: Callable[[str, str], None]
) -> None:
    ids, wanted = choice.token_ids, reference.token_ids
    is_part = seen.left or choice.finish_reason == "abort"
    at = first_difference(ids, wanted)
    if at is None or (is_part and at == len(ids)):
        if at is None and not is_part:
            if choice.finish_reason != reference.finish_reason:
                say("mismatch", f"ended by {choice.finish_reason} instead of {reference.finish_reason}")
            elif choice.text != reference.text:
                say("mismatch", f"text {choice.text[-80:]!r} instead of {reference.text[-80:]!r}")
        return
    gap = math.inf
    if at < min(len(ids), len(wanted)):
        likely = reference.logprobs[at]
        gap = max(likely.values()) - likely.get(ids[at], -math.inf)
    where = f"token {at} of {len(ids)}, {len(wanted)} wanted: {ids[at : at + 3]} instead of {wanted[at : at + 3]}, {gap:.2g} nats"
    say("near_tie" if gap <= NEAR_TIE else "mismatch", where)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two sequences part, perhaps by the end of one; None if they are equal."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Those that are: near ties aren't."""
    return [finding for finding in findings if finding.what != "near_tie"]
