"""Drafts by a draft model on the V1 model runner, where they are worth more than those from text.

Errors here are contained as the component ``draft_model``, see `vllm_aasd.engine.failsafe`.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.drafting.model_survival import ModelSurvival
from vllm_aasd.drafting.router import LONGEST_DRAFT, MAX_PASS_TOKENS, Candidate, DraftModelRouter, Plan
from vllm_aasd.drafting.step_time import StepTimeModel
from vllm_aasd.engine import startup
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.draft_model import DraftModel, Span

logger = logging.getLogger("vllm.aasd")


class Asked(NamedTuple):
    """A request that wants a draft.

    Attributes:
        request_id: the request.
        sampled: the tokens that it has emitted in this step, at least one.
        token_ids: ``[n]`` int32, its context, these included.
        limit: the longest draft.
        drafter: what may draft for it: ``text``, ``model`` or ``both``.
    """

    request_id: str
    sampled: list[int]
    token_ids: np.ndarray
    limit: int
    drafter: str


class _Draft:
    """What the draft model drafts for one request."""

    __slots__ = ("candidate", "confidences", "context", "num_read", "survival", "token_ids")

    def __init__(self, candidate: Candidate, context: np.ndarray) -> None:
        self.candidate = candidate
        self.context = context
        self.num_read = len(context) - candidate.num_unread
        self.token_ids: list[int] = []
        self.confidences: list[float] = []
        self.survival = np.empty(0, np.float32)

    def unread(self) -> Span:
        """What the draft model reads to draft the next token."""
        tokens = np.concatenate([self.context[self.num_read :], np.array(self.token_ids, np.int32)])
        start = self.num_read
        if self.token_ids:
            tokens, start = tokens[-1:], len(self.context) + len(self.token_ids) - 1
        return Span(self.candidate.row, start, tokens.astype(np.int32))


class ModelDrafts:
    """Has a draft model draft for the requests of a batch that it is worth it for.

    Args:
        model: the draft model.
        step_time: what is known of the time of the target's steps.
        faults: of the worker.
        text: the drafter that drafts for the others.
        max_num_reqs: the most requests of a batch.

    Attributes:
        seconds: that the draft model took in this step.
    """

    def __init__(
        self, model: DraftModel, step_time: StepTimeModel, faults: Faults, text: Drafter, max_num_reqs: int
    ) -> None:
        self._model = model
        self._text = text
        self._max_num_reqs = max_num_reqs
        self._max_pass_tokens = min(MAX_PASS_TOKENS, model.max_pass_tokens)
        self._router = DraftModelRouter(step_time)
        self._known = ModelSurvival()
        self._faults = faults
        self._drafts: dict[str, _Draft] = {}
        # By request, the survival of its draft, and the draft from text that it replaced.
        self._used: dict[str, tuple[np.ndarray, list[int]]] = {}
        self.seconds = 0.0

    def profile(self) -> None:
        """Compile the draft model, and time its passes."""
        longest = self._max_pass_tokens
        self._model.compute_logits(self._model.dummy_run(longest)[:1])
        samples = startup.profile_steps(
            self._model.dummy_run,
            self._model.compute_logits,
            min(self._max_num_reqs, longest),
            lambda is_in_time: is_in_time,
        )
        began = time.perf_counter()
        self._model.dummy_run(longest)
        samples.append((longest, time.perf_counter() - began))
        self._router.passes.warm_start(samples)
        logger.info("aasd: a pass of the draft model takes %.2f of a step of the target", self._router.pass_time(1))

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Drop the state of requests that have ended, and what was read into blocks that change owners."""
        self.seconds = 0.0
        with self._faults.contained("draft_model"):
            self._forget(scheduled.finished_req_ids)
            self._model.begin_step(scheduled)
            return
        # The owners of what was read are unknown, so none is used.
        self._model.clear()

    def clear(self) -> None:
        """Forget what the draft model has read."""
        self._model.clear()

    def predicted_survival(self, request_id: str) -> np.ndarray:
        """The survival predicted for a request's last draft, from text or from the model; see `Drafter`."""
        used = self._used.get(request_id)
        return self._text.predicted_survival(request_id) if used is None else used[0]

    def replaced(self, request_id: str) -> list[int] | None:
        """The last draft from text that gave way to the draft model's; None if it didn't."""
        used = self._used.get(request_id)
        return None if used is None else used[1]

    def improve(
        self, drafts: list[list[int]], survival: np.ndarray, asked: Mapping[int, Asked], requests: Mapping[str, Any]
    ) -> list[list[int]]:
        """Choose between drafts from text and the draft model's, which are made where that is expected to pay.

        Args:
            drafts: per batch row, from text.
            survival: ``[B, K]`` float32, of these; becomes that of the drafts which are returned.
            asked: the requests that want a draft, by row.
            requests: vLLM's runner's state of each, by id.

        Returns:
            Per batch row, its draft.
        """
        self._used = {}
        by_model = {row: one for row, one in asked.items() if one.drafter != "text"}
        if not by_model or self._faults.is_off("draft_model"):
            return drafts
        began = time.perf_counter()
        made: Sequence[_Draft] = []
        with self._faults.contained("draft_model"):
            self._learn(by_model.values())
            candidates = [
                candidate
                for row, one in by_model.items()
                if (candidate := self._candidate(row, one, requests[one.request_id])) is not None
            ]
            plan = self._router.plan(candidates, survival)
            contexts = {row: one.token_ids for row, one in by_model.items()}
            self._catch_up(plan.catching_up, contexts)
            made = self._made(plan, contexts, len(drafts))
        chosen = list(drafts)
        for draft in made:
            row, request_id = draft.candidate.row, draft.candidate.request_id
            self._drafts[request_id] = draft
            if draft.survival.sum() > survival[row].sum():
                chosen[row] = draft.token_ids
                survival[row] = 0
                survival[row, : len(draft.survival)] = draft.survival
                self._used[request_id] = draft.survival, drafts[row]
        self.seconds += time.perf_counter() - began
        return chosen

    def _learn(self, asked: Iterable[Asked]) -> None:
        """Learn what became, or would have become, of the last drafts."""
        for one in asked:
            draft = self._drafts.pop(one.request_id, None)
            if draft is None:
                self._known.observe(one.request_id, [], 0)
                continue
            num_verified, num_accepted = agreement(draft.token_ids, one.sampled)
            self._known.observe(one.request_id, draft.confidences[:num_verified], num_accepted)

    def _candidate(self, row: int, asked: Asked, request: Any) -> Candidate | None:
        """A request as the router sees it; None if the draft model can't draft for it in this step."""
        context = asked.token_ids
        # All tokens but the last of a draft are read.
        limit = min(asked.limit, LONGEST_DRAFT, self._model.num_slots(row) - len(context) + 1)
        if limit < 1:
            return None
        num_emitted = len(context) - request.num_prompt_tokens
        return Candidate(
            row=row,
            request_id=asked.request_id,
            expected=self._known.expected(asked.request_id),
            num_unread=len(context) - self._model.num_read(row, context),
            num_emitted=num_emitted,
            max_tokens=request.sampling_params.max_tokens or num_emitted + LONGEST_DRAFT,
            limit=limit,
            is_pinned=asked.drafter == "model",
        )

    def _catch_up(self, candidates: Iterable[Candidate], contexts: Mapping[int, np.ndarray]) -> None:
        """Have the draft model read what it hasn't, as much as one pass takes."""
        spans, room = [], self._max_pass_tokens
        for candidate in candidates:
            context = contexts[candidate.row]
            start = len(context) - candidate.num_unread
            # The last token is read with the first draft.
            tokens = context[start : min(start + room, len(context) - 1)]
            if len(tokens):
                spans.append(Span(candidate.row, start, tokens))
                room -= len(tokens)
        if spans:
            began = time.perf_counter()
            self._model.read(spans)
            self._router.passes.observe(self._max_pass_tokens - room, time.perf_counter() - began)

    def _made(self, plan: Plan, contexts: Mapping[int, np.ndarray], num_requests: int) -> Sequence[_Draft]:
        """Have the draft model draft, for as long as one more token is worth its time."""
        drafted, room = [], self._max_pass_tokens
        for candidate in plan.drafted:
            room -= candidate.num_unread
            if room >= 0:
                drafted.append(_Draft(candidate, contexts[candidate.row]))
        going_on = drafted
        num_tokens = num_requests
        while going_on:
            spans = [draft.unread() for draft in going_on]
            began = time.perf_counter()
            token_ids, confidences = self._model.predict(spans)
            self._router.passes.observe(sum(len(span.token_ids) for span in spans), time.perf_counter() - began)
            for draft, token_id, confidence in zip(going_on, token_ids, confidences, strict=True):
                draft.token_ids.append(token_id)
                draft.confidences.append(confidence)
                draft.survival = self._known.survival(draft.candidate.request_id, draft.confidences)
            num_tokens += len(going_on)
            going_on = [
                draft
                for draft in going_on
                if len(draft.token_ids) < draft.candidate.limit
                and self._router.goes_on(
                    float(draft.survival[-1]), draft.candidate.expected, len(going_on), num_tokens, plan.rate
                )
            ]
        return drafted

    def _forget(self, request_ids: Collection[str]) -> None:
        self._known.forget(request_ids)
        self._router.forget(request_ids)
        for request_id in request_ids:
            self._drafts.pop(request_id, None)


def agreement(draft: Sequence[int], emitted: Sequence[int]) -> tuple[int, int]:
    """What a draft would have come to, by the tokens that were emitted in its place.

    Args:
        draft: its tokens.
        emitted: the tokens that its request emitted, at least one.

    Returns:
        How many of its tokens these say something about, and how many of those would have been accepted.
    """
    num_verified = min(len(draft), len(emitted))
    for position in range(num_verified):
        if draft[position] != emitted[position]:
            return position + 1, position
    return num_verified, num_verified
