"""What must hold of a response, whatever else the server does at the time; and what its log may hold."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aasd_testing.fuzz.client import Choice, Response
from aasd_testing.fuzz.profiles import FLEETING, MAX_MODEL_LEN
from aasd_testing.fuzz.request_types import CALL_REGEX, CHOICES, Request

NEAR_TIE = 1e-3
"""Nats between two tokens of which either is right: in float32, another batch shape moves logits by about 1e-5."""

LONG_VALUE = re.compile("k{81}|v{81}")
"""More of a client's own name or value than a message may hold."""

_MAX_ERROR_CHARS = 3000

# With these alone, a log-probability is the plain model's.
_PLAIN_SAMPLING = {"temperature", "max_tokens", "logprobs", "prompt_logprobs", "logprob_token_ids", "ignore_eos"}

_LOG_PREFIX = re.compile(r"(?m)^(\(.*?\) )?((ERROR|WARNING) [\d-]+ [\d:]+ \[.*?\] ?)?")
_TRACEBACK = r"Traceback \(most recent call last\):\n(?:(?: .*)?\n)+\S.*\n?"
# Those of exceptions that were raised from one another are one.
_CHAIN = re.compile(rf"{_TRACEBACK}(?:(?:.*\n){{0,3}}?(?:The above exception|During handling).*\n\n{_TRACEBACK})*")

# vLLM logs tracebacks of refused streams, and of tool calls that aren't JSON.
_VLLMS_OWN = ("VLLMValidationError", "RequestOptionsError", "hermes_tool_parser.py")


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        what: ``lost``, ``status``, ``count``, ``finish``, ``form``, ``logprobs`` or ``mismatch`` for a response;
            ``leftover``, ``faults``, ``log``, ``leak`` or ``dead`` for the server. ``near_tie`` isn't a failure.
        detail: for people.
    """

    what: str
    detail: str


class Reference(NamedTuple):
    """The answer of the target alone; `logprobs` are the likeliest tokens' by id, after penalties and masks."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[dict[int, float]]


def failures(findings: list[Finding]) -> list[Finding]:
    """All but near ties."""
    return [finding for finding in findings if finding.what != "near_tie"]


def check(request: Request, response: Response, reference: Reference | None) -> list[Finding]:
    """All that is wrong with a response, given the reference if the request has one.

    What sampling parameters ask for is checked by the reference, which has the same ones.
    """
    found = list(_check_status(request, response))
    if response.status == 200 and request.refused_with is None:
        for choice in response.choices:
            found += [*_check_tokens(request, response, choice), *_check_logprobs(request, choice)]
            if choice.finish_reason in ("stop", "tool_calls"):
                found += _check_structure(request, choice)
        if not response.disconnected:
            found += _check_counts(request, response)
        if reference is not None and response.choices:
            found += _compare(request, response, reference)
    return [Finding(what, f"{request.type}: {detail}") for what, detail in found]


Details = Iterator[tuple[str, str]]


def _check_status(request: Request, response: Response) -> Details:
    error = response.error[:300]
    if len(response.error) > _MAX_ERROR_CHARS or LONG_VALUE.search(response.error):
        yield "status", f"an error of {len(response.error)} characters: {error}"
    if response.status is None:
        yield "lost", f"no response: {error}"
    elif request.refused_with is None:
        if response.status != 200 and not (_names_a_fleeting_corpus(request) and "Known:" in response.error):
            yield "status", f"{response.status}: {error}"
    elif response.status != 400 or request.refused_with not in response.error:
        yield "status", f"{response.status} instead of a refusal with {request.refused_with!r}: {error}"


def _names_a_fleeting_corpus(request: Request) -> bool:
    return FLEETING in request.xargs.get("aasd_corpora", ())


def _check_counts(request: Request, response: Response) -> Details:
    wanted = request.sampling.get("n", 1)
    if len(response.choices) != wanted:
        yield "count", f"{len(response.choices)} choices instead of {wanted}"
    known = [choice.token_ids for choice in response.choices if choice.token_ids is not None]
    emitted = sum(map(len, known))
    if len(known) == len(response.choices) and response.num_answer_tokens not in (None, emitted):
        yield "count", f"usage says {response.num_answer_tokens} tokens for {emitted}"
    if request.prompt and response.num_prompt_tokens not in (None, len(request.prompt)):
        yield "count", f"usage says {response.num_prompt_tokens} prompt tokens for {len(request.prompt)}"


def _check_tokens(request: Request, response: Response, choice: Choice) -> Details:
    sampling, ids = request.sampling, choice.token_ids or []
    if choice.finish_reason is None:
        if not response.disconnected:
            yield "lost", "the answer has no end"
    elif choice.finish_reason not in ("stop", "length", "tool_calls"):
        yield "finish", choice.finish_reason
    if request.prompt:
        most = min(sampling["max_tokens"], MAX_MODEL_LEN - len(request.prompt))
        if len(ids) > most or (choice.finish_reason == "length" and len(ids) != most):
            yield "count", f"{len(ids)} tokens of {most}, ended by {choice.finish_reason}"


def _check_logprobs(request: Request, choice: Choice) -> Details:
    if choice.prompt_logprobs not in (None, len(request.prompt)):
        yield "logprobs", f"for {choice.prompt_logprobs} positions of a prompt of {len(request.prompt)}"
    rows = choice.logprobs
    if rows is None:
        if "logprobs" in request.sampling and choice.token_ids:
            yield "logprobs", "none, though they were asked for"
        return
    if request.prompt and len(rows) != len(choice.token_ids or ()):
        yield "logprobs", f"{len(rows)} rows for {len(choice.token_ids or ())} tokens"
    # Two of the likeliest that read the same may be one, so their number isn't checked.
    if any(value is None or not value <= 1e-4 for value, _ in rows):
        yield "logprobs", "a value that is none"
    named = {f"token_id:{token}" for token in request.sampling.get("logprob_token_ids", ())}
    if any(not named <= set(others) for _, others in rows):
        yield "logprobs", "not for all tokens that were named"


def _check_structure(request: Request, choice: Choice) -> Details:
    constraint = request.sampling.get("structured_outputs", {})
    must_call = request.body.get("tool_choice", "auto") != "auto" or constraint.get("regex") == CALL_REGEX
    if must_call:
        if not choice.tool_arguments:
            yield "form", f"no tool is called: {choice.text[:200]!r}"
        for text in choice.tool_arguments:
            if not follows_schema(text):
                yield "form", f"arguments that don't follow the schema: {text[:200]!r}"
    elif "json" in constraint and not follows_schema(choice.text):
        yield "form", f"doesn't follow the schema: {choice.text[:200]!r}"
    elif "regex" in constraint and not re.fullmatch(constraint["regex"], choice.text):
        yield "form", f"doesn't match the regular expression: {choice.text[:200]!r}"
    elif "choice" in constraint and choice.text not in CHOICES:
        yield "form", f"none of the choices: {choice.text[:200]!r}"


def _compare(request: Request, response: Response, reference: Reference) -> Details:
    choice = response.choices[0]
    ids, wanted = choice.token_ids or [], reference.token_ids
    at = first_difference(ids, wanted)
    if choice.logprobs and set(request.sampling) <= _PLAIN_SAMPLING:
        for token, (value, _), likely in zip(ids[:at], choice.logprobs, reference.logprobs, strict=False):
            if value is None or abs(value - likely.get(token, math.inf)) > 0.01:
                yield "logprobs", f"{value} for token {token} instead of {likely.get(token)}"
                break
    if at is None:
        if response.disconnected:
            return
        if choice.finish_reason != reference.finish_reason:
            yield "mismatch", f"ended by {choice.finish_reason} instead of {reference.finish_reason}"
        elif choice.text != reference.text:
            yield "mismatch", f"text {choice.text[-80:]!r} instead of {reference.text[-80:]!r}"
    elif not (response.disconnected and at == len(ids)):
        gap = math.inf
        if at < min(len(ids), len(wanted)):
            likely = reference.logprobs[at]
            gap = max(likely.values()) - likely.get(ids[at], -math.inf)
        what = "near_tie" if gap <= NEAR_TIE else "mismatch"
        yield what, f"at token {at}: {ids[at : at + 3]} instead of {wanted[at : at + 3]}, {gap:.2g} nats"


def follows_schema(text: str) -> bool:
    """Whether a text is an object of `request_types.SCHEMA`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    if not isinstance(value, dict) or set(value) != {"kind", "n"}:
        return False
    return value["kind"] in ("text", "code") and type(value["n"]) is int and 0 <= value["n"] <= 99


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index at which two sequences differ, perhaps by the end of one; None if they are equal."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def check_log(log: str) -> list[Finding]:
    """Unexpected tracebacks in a log, and long values of a client's."""
    found = []
    for chain in _CHAIN.findall(_LOG_PREFIX.sub("", log)):
        is_injected = "InjectedFault" in chain.splitlines()[-1]
        if not is_injected and not any(known in chain for known in _VLLMS_OWN):
            found.append(Finding("log", chain[-1500:]))
    lines = [line for line in log.splitlines() if LONG_VALUE.search(line)]
    return found + [Finding("log", f"{len(line)} characters of a client's: {line[:200]}") for line in lines]
