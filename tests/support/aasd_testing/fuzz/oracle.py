"""What must come of a request, whatever else goes on: judged from the request, its answer and the target's own."""

import json
import math
import re
from collections.abc import Mapping, Sequence

from aasd_testing.fuzz import kinds
from aasd_testing.fuzz.cases import Case, Step, key
from aasd_testing.fuzz.limits import MAX_MODEL_LEN
from aasd_testing.fuzz.observed import Choice, Finding, Observation, Reference
from aasd_testing.fuzz.prompts_of_tokens import Prompts, expanded

NEAR_TIE = 1e-3
"""Nats between two tokens of which either may come: in float32 a batch of another shape moves logits by about 1e-5."""

LONG_VALUE = re.compile("k{81}|v{81}")
"""More of a name or value of the client's own than a message may hold."""

_MAX_ERROR_CHARS = 3000

_PREFIX = re.compile(r"^(\(.*?\) )?((ERROR|WARNING) [\d-]+ [\d:]+ \[.*?\] ?)?")
_CHAINED = ("The above exception was", "During handling of the above")

# vLLM's own, of what isn't a fault of the server's: a stream that is refused, a model's call of a tool that isn't JSON,
# and log-probabilities of an echoed prompt whose request was aborted before there were any.
_VLLMS_OWN = ("VLLMValidationError", "RequestOptionsError", "hermes_tool_parser.py", "_create_completion_logprobs")

# With these a log-probability is the plain model's.
_PLAIN_SAMPLING = {"temperature", "max_tokens", "logprobs", "prompt_logprobs", "logprob_token_ids", "ignore_eos"}


def judge_case(
    case: Case, seen: Sequence[Observation | None], references: Mapping[str, Reference], prompts: Prompts
) -> list[Finding]:
    """Everything about a case's requests that isn't as it must be, given what was seen of each and the references of
    all compared ones by `cases.key`."""
    found: list[Finding] = []
    for index, (step, one) in enumerate(zip(case["steps"], seen, strict=True)):
        if step["do"] != "ask":
            continue
        if one is None:
            found.append(Finding("lost", index, f"{step['kind']}: never sent"))
            continue
        reference = references[key(step)] if step["compared"] else None
        found += Judge(index, step, one, len(prompts.ids(step["prompt"])), prompts).judge(reference)
    return found


class Judge:
    """The judge of one request: the step at an index of its case, with a prompt of so many tokens."""

    def __init__(self, index: int, step: Step, seen: Observation, prompt_tokens: int, prompts: Prompts) -> None:
        self._index, self._step, self._seen = index, step, seen
        self._via = step["via"]
        self._sampling = expanded(step["sampling"])
        self._prompt_tokens, self._prompts = prompt_tokens, prompts
        self._found: list[Finding] = []

    def judge(self, reference: Reference | None) -> list[Finding]:
        """All that isn't as it must be; compared if there is a reference."""
        if self._is_answered():
            for choice in self._seen.choices:
                self._judge_choice(choice)
            if not self._seen.left and not is_aborted(self._step, self._seen):
                self._judge_counts()
            if reference is not None and self._seen.choices and self._seen.choices[0].token_ids is not None:
                self._compare(self._seen.choices[0], reference)
        return self._found

    def _say(self, what: str, detail: str) -> None:
        self._found.append(Finding(what, self._index, f"{self._step['kind']}: {detail}"))

    def _is_answered(self) -> bool:
        step, seen = self._step, self._seen
        if len(seen.error) > _MAX_ERROR_CHARS or LONG_VALUE.search(seen.error):
            self._say("status", f"an error of {len(seen.error)} characters: {seen.error[:200]}")
        if seen.left and seen.status in (None, 200):
            return seen.status == 200
        if seen.status is None:
            self._say("lost", f"no answer: {seen.error[:300]}")
        elif "refused" in step:
            if seen.status != 400 or step["refused"] not in seen.error:
                self._say("status", f"{seen.status} instead of a refusal with {step['refused']!r}: {seen.error[:300]}")
        elif seen.status == 404 and step.get("adapter") and "adapter" in seen.disturbed:
            pass
        elif seen.status in (400, 500) and "abort" in seen.disturbed and (step.get("echo") or self._via == "scoring"):
            # vLLM looks for the log-probabilities of a prompt that was never read.
            pass
        elif seen.status != 200:
            self._say("status", f"{seen.status}: {seen.error[:300]}")
        else:
            return True
        return False

    def _judge_counts(self) -> None:
        seen, wanted = self._seen, self._sampling.get("n", 1)
        if len(seen.choices) != wanted:
            self._say("count", f"{len(seen.choices)} choices instead of {wanted}")
        known = [choice.token_ids for choice in seen.choices if choice.token_ids is not None]
        emitted = sum(map(len, known))
        if len(known) == len(seen.choices) and seen.num_answer_tokens not in (None, emitted):
            self._say("count", f"usage tells {seen.num_answer_tokens} tokens of {emitted}")
        is_ours = self._via in ("completions", "stream", "scoring")
        if is_ours and seen.num_prompt_tokens not in (None, self._prompt_tokens):
            self._say("count", f"usage tells {seen.num_prompt_tokens} prompt tokens of {self._prompt_tokens}")

    def _judge_choice(self, choice: Choice) -> None:
        if choice.finish_reason is None:
            if not self._seen.left and not is_aborted(self._step, self._seen):
                self._say("lost", "the answer has no end")
        elif choice.finish_reason == "abort":
            if not self._seen.left and "abort" not in self._seen.disturbed:
                self._say("finish", "aborted, and nobody asked for it")
        elif choice.finish_reason not in ("stop", "length", "tool_calls"):
            self._say("finish", choice.finish_reason)
        if choice.token_ids is not None:
            self._judge_tokens(choice, choice.token_ids)
        if choice.finish_reason != "abort":
            self._judge_logprobs(choice)
        if choice.finish_reason in ("stop", "tool_calls"):
            self._judge_structure(choice)

    def _judge_tokens(self, choice: Choice, ids: list[int]) -> None:
        sampling = self._sampling
        if self._via not in ("chat", "chat_stream"):
            most = min(sampling["max_tokens"], MAX_MODEL_LEN - self._prompt_tokens)
            if len(ids) > most or (choice.finish_reason == "length" and len(ids) != most):
                self._say("count", f"{len(ids)} tokens of {most}, ended by {choice.finish_reason}")
        if "allowed_token_ids" in sampling and not set(ids) <= set(sampling["allowed_token_ids"]):
            self._say("form", "a token that isn't allowed")
        for word in sampling.get("bad_words", ()):
            banned = self._prompts.encode(word)
            if any(ids[at : at + len(banned)] == banned for at in range(len(ids))):
                self._say("form", f"the bad word {word!r}")
        if set(ids[:-1]) & set(sampling.get("stop_token_ids", ())):
            self._say("finish", "a stop token within the answer")
        if choice.finish_reason != "stop":
            return
        if len(ids) < sampling.get("min_tokens", 0):
            self._say("count", f"{len(ids)} tokens, fewer than min_tokens")
        if sampling.get("ignore_eos"):
            self._say("finish", "stopped in spite of ignore_eos")
        if isinstance(choice.stop_reason, str) and choice.stop_reason not in sampling.get("stop", ()):
            self._say("finish", f"stopped by {choice.stop_reason!r}")
        kept = sampling.get("include_stop_str_in_output", False)
        for stop in sampling.get("stop", ()):
            at = choice.text.find(stop)
            if at >= 0 and not (kept and at == len(choice.text) - len(stop)):
                self._say("finish", f"the stop string {stop!r} stands within the answer")

    def _judge_logprobs(self, choice: Choice) -> None:
        if choice.prompt_logprobs is not None and choice.prompt_logprobs != self._prompt_tokens:
            self._say("logprobs", f"of {choice.prompt_logprobs} positions of a prompt of {self._prompt_tokens}")
        if choice.logprobs is None:
            if self._sampling.get("logprobs") is not None and choice.token_ids and self._via != "beam":
                self._say("logprobs", "none, though they were asked for")
            return
        first = 0
        if choice.token_ids is not None and not self._via.startswith("chat"):
            first = self._prompt_tokens if self._step.get("echo") else 0
            if len(choice.logprobs) != first + len(choice.token_ids):
                self._say("logprobs", f"{len(choice.logprobs)} rows of {first + len(choice.token_ids)} tokens")
        # Two of the likeliest that read the same may be one, so nothing is said of how many there are; a prompt's first
        # token has none.
        if any(value is None or not value <= 1e-4 for value, _ in choice.logprobs[first > 0 :]):
            self._say("logprobs", "a value that is none")
        named = {f"token_id:{token}" for token in self._sampling.get("logprob_token_ids", ())}
        if any(not named <= set(top) for _, top in choice.logprobs[first:]):
            self._say("logprobs", "not of all tokens that were named")

    def _judge_structure(self, choice: Choice) -> None:
        constraint = self._sampling.get("structured_outputs", {})
        forced = self._step.get("tool_choice") not in (None, "auto")
        called = constraint.get("regex") == kinds.CALL_REGEX
        texts = list(choice.tool_arguments)
        if (forced or called) and not texts:
            self._say("form", f"no tool is called: {choice.text[:200]!r}")
        if "json" in constraint:
            texts.append(choice.text)
        if "json" in constraint or forced or called:
            for text in texts:
                if not is_of_schema(text):
                    self._say("form", f"not of the schema: {text[:200]!r}")
        elif "regex" in constraint and not re.fullmatch(constraint["regex"], choice.text):
            self._say("form", f"not of the regular expression: {choice.text[:200]!r}")
        if "choice" in constraint and choice.text not in kinds.CHOICES:
            self._say("form", f"none of the choices: {choice.text[:200]!r}")

    def _compare(self, choice: Choice, reference: Reference) -> None:
        ids, wanted = choice.token_ids or [], reference.token_ids
        is_part = self._seen.left or choice.finish_reason == "abort"
        at = first_difference(ids, wanted)
        if choice.logprobs and set(self._sampling) <= _PLAIN_SAMPLING:
            rows = choice.logprobs[-len(ids) :]
            for token, (value, _), likely in zip(ids[:at], rows, reference.logprobs, strict=False):
                if value is None or abs(value - likely.get(token, math.inf)) > 0.01:
                    self._say("logprobs", f"{value} of token {token} instead of {likely.get(token)}")
                    break
        if at is None:
            if not is_part and choice.finish_reason != reference.finish_reason:
                self._say("mismatch", f"ended by {choice.finish_reason} instead of {reference.finish_reason}")
            elif not is_part and choice.text != reference.text:
                self._say("mismatch", f"text {choice.text[-80:]!r} instead of {reference.text[-80:]!r}")
            return
        if is_part and at == len(ids):
            return
        gap = math.inf
        if at < min(len(ids), len(wanted)):
            likely = reference.logprobs[at]
            gap = max(likely.values()) - likely.get(ids[at], -math.inf)
        said = f"{ids[at : at + 3]} instead of {wanted[at : at + 3]}, {gap:.2g} nats"
        what = "near_tie" if gap <= NEAR_TIE else "mismatch"
        self._say(what, f"token {at} of {len(ids)}, {len(wanted)} wanted: {said}")


def is_aborted(step: Step, seen: Observation) -> bool:
    """Whether the engine ended a request early, as an event told it to; a choice without a token isn't in a stream."""
    if "abort" not in seen.disturbed:
        return False
    least = step["sampling"].get("n", 1) if step["via"].endswith("stream") else 1
    return len(seen.choices) < least or any(choice.finish_reason in (None, "abort") for choice in seen.choices)


def is_of_schema(text: str) -> bool:
    """Whether a text is an object of `kinds.SCHEMA`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    if not isinstance(value, dict) or set(value) != {"kind", "n"}:
        return False
    return value["kind"] in ("text", "code") and type(value["n"]) is int and 0 <= value["n"] <= 99


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two sequences part, perhaps by the end of one; None if they are equal."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def in_log(log: str) -> list[Finding]:
    """What a log shouldn't hold: tracebacks, and long values of a client's."""
    found = [Finding("log", None, text[:1500]) for text in tracebacks(log)]
    lines = [line for line in log.splitlines() if LONG_VALUE.search(line)]
    return found + [Finding("log", None, f"{len(line)} characters of a client's: {line[:200]}") for line in lines]


def tracebacks(log: str) -> list[str]:
    """Every traceback but those of injected faults and `_VLLMS_OWN`; one that was raised from another, once."""
    found, cause = [], ""
    for part in re.split(r"(?m)^.*Traceback \(most recent call last\):", log)[1:]:
        # The stack is indented behind the log's own prefix; the first line that isn't names the exception.
        lines = [_PREFIX.sub("", line) for line in part.splitlines()[1:]]
        end = next((number for number, line in enumerate(lines) if line and not line.startswith(" ")), 0)
        text = cause + "\n".join([lines[end], *lines[:end]])
        if any(line.startswith(_CHAINED) for line in lines[end : end + 4]):
            cause = text + "\n"
            continue
        cause = ""
        if "InjectedFault" not in lines[end] and not any(known in text for known in _VLLMS_OWN):
            found.append(text)
    return found
